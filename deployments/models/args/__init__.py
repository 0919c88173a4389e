"""The args of an llmconfig, as arguments of vLLM."""
