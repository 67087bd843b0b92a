"""Evidence about keys: signed documents that tell where a private key lives, and who says so."""
