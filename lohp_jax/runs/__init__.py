"""Runs over one directory."""
