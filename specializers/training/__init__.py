"""The training loop and its parts, independent of the methods that use it."""
