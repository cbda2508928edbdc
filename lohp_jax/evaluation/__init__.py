"""Scores, honesty checks and the report."""
