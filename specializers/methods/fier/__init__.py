"""FIER: reading only the best tokens of a long context, and choosing how many."""
