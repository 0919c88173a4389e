"""The engine: vLLM in separate processes."""
