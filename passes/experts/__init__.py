"""Found experts: matched, checked against what kernels can run, and said in one instruction."""
