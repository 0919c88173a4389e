"""Energy sources of a machine, and checks of their counters."""
