"""The demo: one real-sized layer, compiled, checked and measured."""
