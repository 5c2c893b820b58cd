"""What reports say of a graph: sites, candidates, and how near each came."""
