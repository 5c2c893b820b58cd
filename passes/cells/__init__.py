"""Experts read by the letters of their tensors' axes."""
