"""The server: certificate authority and registry."""
