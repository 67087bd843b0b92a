"""Commands of `spire-hw-server`."""
