"""vLLM engines: what they are started with, what they are asked, and a pool of them."""
