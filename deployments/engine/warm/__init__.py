"""Fast engine starts: forks of a process that has imported vLLM."""
