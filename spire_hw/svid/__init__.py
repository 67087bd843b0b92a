"""SPIFFE identities: X509-SVID and JWT-SVID."""
