"""The messages between the registry and the wrappers. Pure."""
