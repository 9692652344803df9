"""Which replica an ask goes to."""
