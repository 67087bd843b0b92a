"""The command line of `spire-hw-plugin`."""
