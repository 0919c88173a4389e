"""The report of a measurement as people get it."""
