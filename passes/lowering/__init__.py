"""Back into torch's FX graph: one op a site, what it replaces removed."""
