"""GreenPrompt LLM Registry: leases LLMs exclusively and accounts for their energy."""
