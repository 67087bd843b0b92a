"""The state of Secure Boot as PCR 7 proves it; whatever is ambiguous is refused."""
