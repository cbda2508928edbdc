"""Haiku networks: classifiers, trunks, encoders, policy, denoiser; only here is Haiku imported."""
