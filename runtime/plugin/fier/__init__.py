"""FIER inside vLLM: attention that reads only the best tokens of the cache."""
