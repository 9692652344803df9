"""Adapter slots of an engine: which adapter is loaded, kept, fetched ahead, or evicted."""
