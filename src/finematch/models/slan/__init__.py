"""SLAN by sections: `locator` (3.1, 3.2), `objective` (3.3, retrieval of 4.2), `detector` (Table 6)."""
