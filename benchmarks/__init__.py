"""A folder for each question; run from the root of the repository, `python -m benchmarks.hub.run`."""
