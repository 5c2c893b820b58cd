"""Rows that indices, masks and loops pick for an expert, and where they come together again."""
