"""Adapter files: reading, checking, converting, merging, and taking in those made elsewhere."""
