"""Runs the registry: decides, commits, acts; and prepares what clients see."""
