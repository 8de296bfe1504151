"""What looks at the kernels from outside and is not shipped: cost model, resource tables, default tables."""
