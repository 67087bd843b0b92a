"""UpstreamAuthority plugins: who signs the server's CA."""
