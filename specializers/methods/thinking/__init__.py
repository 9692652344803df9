"""How long a role thinks: sweeps, curves, and training rows with the shortest correct thoughts."""
