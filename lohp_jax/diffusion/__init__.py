"""Diffusion over the solutions of optimization problems (Diff-L2O)."""
