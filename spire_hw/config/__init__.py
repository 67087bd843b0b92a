"""Configuration text to checked, frozen values."""
