"""How large the parts of a found layer get: loads, capacities, drops, and the sizes of a site."""
