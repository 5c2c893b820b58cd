"""The GPU kernels of a layer, compiled without a GPU and shown."""
