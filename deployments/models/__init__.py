"""Models: where they come from, and which memory and arguments they need."""
