"""Servers elsewhere, one or a fleet of them, as a backend."""
