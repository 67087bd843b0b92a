"""The `spire-hw-server` command: one file for each noun."""
