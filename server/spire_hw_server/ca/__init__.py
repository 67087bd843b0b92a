"""The authorities: which sign, how they are replaced, what they issue."""
