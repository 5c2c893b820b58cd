"""Routers behind found experts: scores, choices and weights."""
