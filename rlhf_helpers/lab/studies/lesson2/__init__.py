"""Studies of lesson 2: every method on one task, over-optimisation and its cures, and single settings."""
