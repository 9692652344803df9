"""Everything that runs inside vLLM, and the keys by which requests talk to it."""
