"""The server: verified bundles behind the Open Inference Protocol v2, with dynamic batching."""
