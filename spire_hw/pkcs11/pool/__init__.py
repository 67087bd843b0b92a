"""The host's side of the worker processes: started, asked in batches, verified, replaced."""
