"""NodeAttestor `tpm`: both halves and their messages."""
