"""The report as people read it: tables for a terminal, and a page."""
