"""Recipes: what they say, the stages they run in, and what they accept."""
