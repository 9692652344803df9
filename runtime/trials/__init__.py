"""Runs that the router asks for: probes, held-out checks, and replies replayed between them."""
