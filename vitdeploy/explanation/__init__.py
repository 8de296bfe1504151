"""What a model looks at, and what its weights are: figures of a bundle, computed by its reference model."""
