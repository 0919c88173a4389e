"""The database; no other code accesses it."""
