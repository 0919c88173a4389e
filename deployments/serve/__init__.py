"""What is Ray Serve: the composition root, the registry actor, the ingress."""
