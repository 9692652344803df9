"""The training loop and its parts. Knows nothing of single methods."""
