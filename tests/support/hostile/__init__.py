"""Tables of hostile inputs, one row each, for the registry, its wrappers, and what a client may ask them to load."""
