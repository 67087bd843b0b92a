"""Tasks, watches, workers and waiting."""
