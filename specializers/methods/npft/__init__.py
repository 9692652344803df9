"""NPFT: tuning the base to bear the quantiser's error."""
