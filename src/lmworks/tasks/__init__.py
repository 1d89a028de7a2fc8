"""Tasks: what goes into a model, and what its numbers mean. Torch-free."""
