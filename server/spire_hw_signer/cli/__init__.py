"""Commands of spire-hw-signer."""
