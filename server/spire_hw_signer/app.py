"""The composition root: builds the signer from its settings, runs it, closes it."""
