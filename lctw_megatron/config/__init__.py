"""The schema of a run and how recipes are read."""
