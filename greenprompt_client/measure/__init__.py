"""``greenprompt measure``: experiments, their result folders and their figures."""
