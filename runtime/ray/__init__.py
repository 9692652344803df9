"""Engines as replicas of a Ray Serve deployment, on this machine or on a cluster."""

from __future__ import annotations

from .ray_settings import RaySettings

__all__ = ["RaySettings"]
