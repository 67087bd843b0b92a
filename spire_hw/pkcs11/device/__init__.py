"""The process that holds the vendor's module: one token, one operation at a time."""
