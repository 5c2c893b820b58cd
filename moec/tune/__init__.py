"""Tuning: candidates of a layer's plan, measured or modelled, and the search for the fastest."""
