"""Training a generator: config, objectives, update, loop, checkpoints."""
