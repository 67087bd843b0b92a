"""Sockets: who is at the other end, and bytes to and from it."""
