"""The wrapper of an LLM Machine: one LLM and one lease at a time."""
