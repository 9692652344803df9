"""The cheapest assignment within limits: prediction, integer program, search, and the held-out check."""
