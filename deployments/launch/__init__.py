"""Up, down, and the nodes of a cluster."""
