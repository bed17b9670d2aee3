"""SLAN by sections: `locator` (3.1, 3.2), `objective` (3.3, retrieval of 4.2), `run` (4.1), `detector` (Table 6).

Nothing is imported here: `from finematch.slan.locator import SelfLocator`, `from finematch.slan.objective import SLAN`.
"""
