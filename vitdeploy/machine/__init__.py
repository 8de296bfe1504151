"""The machine that this runs on: its identity, GPUs, memory and caches, and processes beside this one."""
