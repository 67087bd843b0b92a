"""Whether nodes' machines are in a state their policies allow, now and from then on."""
