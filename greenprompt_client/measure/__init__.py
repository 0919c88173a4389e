"""``greenprompt measure``: experiments, their folders, and their figures."""
