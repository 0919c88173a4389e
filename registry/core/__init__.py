"""What the registry decides, and what it decides on. Pure."""
