"""Energy accounting: the meter, attribution to prompts, lease accounts."""
