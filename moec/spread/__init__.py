"""A layer's experts over the ranks of a process group: its op in the graph, hops of rows, and plans of it."""
