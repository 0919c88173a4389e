"""``greenprompt demo``, and the LLMs that it and the tests make."""
