"""Starting and stopping a registry, and the nodes of a cluster."""
