"""Several ways to run a layer beside each other, each in a process of its own, measured in turns."""
