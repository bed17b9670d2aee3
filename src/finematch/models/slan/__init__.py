"""SLAN by sections: `towers`, `proposals`, `adaptor`, `locator` (3.1, 3.2), `contrast`, `matching`, `objective` (3.3,
retrieval of 4.2), `detector` (Table 6), and a file for each task of 4.2 and 4.3."""
