"""What a role gives: its schema, the shape that prompts show, and reading it from a reply."""
