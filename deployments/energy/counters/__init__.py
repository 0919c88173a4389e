"""What counts energy on a machine, and whether it can be believed."""
