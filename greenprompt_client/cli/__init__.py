"""The ``greenprompt`` command."""
