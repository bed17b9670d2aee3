"""SLAN by the paper's sections: `locator` (3.1, 3.2), `objective` (3.3, and retrieval of 4.2).

Nothing is imported here: `from finematch.slan.locator import SelfLocator`, `from finematch.slan.objective import SLAN`.
"""
