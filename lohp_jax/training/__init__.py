"""Training of anything: the host loop, devices, gradients, checkpoints and metrics; no method."""
