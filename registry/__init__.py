"""GreenPrompt LLM Registry: hands LLMs out exclusively and keeps an honest account of their energy."""
