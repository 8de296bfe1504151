"""TensorRT engines: how they are built, proven, checked before they are loaded, and run."""
