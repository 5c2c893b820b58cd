"""Experts that keep code of their own: their rows are sorted once and run slice by slice."""
