"""What a network is: the reference, its exact rewrites, the deployed form and its precisions."""
