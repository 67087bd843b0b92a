"""The log that a device keeps of its own use: read from it, checked, and kept in the audit log."""
