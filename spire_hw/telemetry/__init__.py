"""Metrics: what happens how often, how long it takes, how things stand; and who may read it."""
