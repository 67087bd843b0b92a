"""The keys of one host on several tokens."""
