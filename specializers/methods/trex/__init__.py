"""T-REX: a mixture of rank-one experts, its layer, tuner, and exports."""
