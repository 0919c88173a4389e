"""Sums and reports of what was used. Pure."""
