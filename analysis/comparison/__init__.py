"""Which runs may be compared in one table, and the rows that compare them."""
