"""``greenprompt demo``, and the tiny LLMs for it and the tests."""
