"""Sums and reports of energy and emissions. Pure."""
