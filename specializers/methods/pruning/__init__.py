"""Pruning without training: neurons (width) or blocks (depth)."""
