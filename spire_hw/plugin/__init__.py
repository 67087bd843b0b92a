"""Contracts of the plugin kinds."""
