"""OpenAI's chat completions and responses over roles, variants and workflows."""

__all__: list[str] = []
