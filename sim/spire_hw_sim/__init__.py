"""Simulators: everything a trust domain needs, without hardware."""
