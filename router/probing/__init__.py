"""Measuring each variant at each role: what to run, when to stop, what it means."""
