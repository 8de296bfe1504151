"""TensorRT engines: how they are built, audited, checked before they are loaded, and run."""
