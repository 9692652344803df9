"""Engines as replicas of a Ray Serve deployment, on this machine or on a cluster."""
