"""Rolling of expert loops, so that Dynamo sees one graph."""
