"""NodeAttestor `x509pop`: a certificate the node was given, and proof that it holds the key."""
