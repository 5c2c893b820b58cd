"""What commands do with a user's model: load it, scan it, prove it, record its routes, find what is wrong."""
