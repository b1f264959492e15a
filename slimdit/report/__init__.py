"""Numbers to a decision: records of what was measured, and the tables, fronts and reports made of them."""
