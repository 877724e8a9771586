"""Keeps a run from being lost or silently ruined: checkpoints, resuming, locks, signals, checks for NaN."""
