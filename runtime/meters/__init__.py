"""CPU-seconds and energy, read from the machine."""
