"""NPFT: tuning the base to tolerate the quantiser's error."""
