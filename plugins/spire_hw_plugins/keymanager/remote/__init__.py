"""KeyManager `remote`: keys held by spire-hw-signer on another host."""
