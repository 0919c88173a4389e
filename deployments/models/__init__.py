"""What is deployed: where models come from, what they need."""
