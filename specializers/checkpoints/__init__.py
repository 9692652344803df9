"""Model weights on disk: reading, writing, rounding to few bits, and running a model layer by layer."""
