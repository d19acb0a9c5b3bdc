"""Which runs may stand side by side, and the rows that compare them."""
