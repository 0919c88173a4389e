"""Joules: meter, attribution, accounts."""
