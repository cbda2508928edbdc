"""Single tasks that compare optimizers."""
