"""Masks of capacity routing: products, queues and seat numbers, lifted to what they say of a pair."""
