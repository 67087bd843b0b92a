"""Many light nodes in one process, to load a server with attestations and heartbeats."""
