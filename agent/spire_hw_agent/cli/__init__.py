"""Commands of `spire-hw-agent`."""
