"""GPUs that need not be there: their figures, one kernel compiled for them, and what its machine code says."""
