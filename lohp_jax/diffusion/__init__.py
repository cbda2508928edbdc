"""Diffusion over solutions: sample, then refine (Diff-L2O)."""
