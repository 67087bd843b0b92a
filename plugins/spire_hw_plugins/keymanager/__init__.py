"""Key managers: each makes keys in one kind of place and signs with them, for both hosts."""
