"""A closer look at trained networks, for the report: pure functions on arrays and modules."""
