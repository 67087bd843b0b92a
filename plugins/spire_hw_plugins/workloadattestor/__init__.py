"""What a local process is."""
