"""PAT: pruning-aware tuning, channels removed while the role is learnt."""
