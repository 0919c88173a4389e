"""JSON bodies, and the HTTP client that fetches them."""
