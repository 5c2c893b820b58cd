"""Rows of every expert on every token or seat, and tables of seats."""
