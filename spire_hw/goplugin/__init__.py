"""External plugins over go-plugin's protocol, from both ends: as their host and as their guest."""
