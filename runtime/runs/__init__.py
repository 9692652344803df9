"""Runs of a workflow: sessions, the executor, steps, batches, and traces."""
