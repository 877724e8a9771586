"""What keeps a run from being lost or silently ruined: checkpoints, resuming, locks, signals, and what is watched."""
