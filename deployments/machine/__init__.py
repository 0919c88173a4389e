"""Facts of this host."""
