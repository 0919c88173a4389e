"""The registry's decisions, and the records they are based on. Pure."""
