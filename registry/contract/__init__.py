"""What the registry and the wrappers say to each other. Pure."""
