"""What compiled graphs call: ops, generated kernels as objects, their memory, what was measured to be fastest."""
