"""The audit log: written before anything is signed, chained, and witnessed by others."""
