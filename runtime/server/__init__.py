"""The HTTP server: workflows, roles and variants behind OpenAI's protocol. Imported by `metier serve` only.

`server_settings` alone is light; everything else needs FastAPI, uvicorn and prometheus_client, which come with vLLM.
"""

__all__: list[str] = []
