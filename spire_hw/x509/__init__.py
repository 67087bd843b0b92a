"""X.509: requests, certificates, chains."""
