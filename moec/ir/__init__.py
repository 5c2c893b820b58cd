"""What the compiler speaks: graphs, sizes, expressions, sites and specs, as frozen values with text forms."""
