"""The engine: vLLM in processes of its own."""
