"""Offline trajectories: roll-out, matching, store."""
