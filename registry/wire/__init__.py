"""What goes over HTTP: the bodies, and the client that fetches them."""
