"""What this machine computes fastest: its processor, number types, threads, and what was measured of them."""
