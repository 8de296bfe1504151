"""Whether a bundle, a machine or a running server computes what the checkpoint computes."""
