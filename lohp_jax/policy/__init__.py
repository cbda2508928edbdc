"""The policy: encoder, trunk, Gaussian kernels and balance objectives."""
