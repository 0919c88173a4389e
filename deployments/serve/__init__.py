"""The Ray Serve side: the composition root, the registry actor, the ingress."""
