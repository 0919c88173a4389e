"""One lease, one LLM: the wrapper of an LLM Machine."""
