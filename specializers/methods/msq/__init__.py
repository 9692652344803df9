"""MSQ: how many bits each matrix needs, found while tuning."""
