"""Starts trainings and evaluations: devices, launchers, batch sizes, stages and recipes.

The command is ``tinyllava-switchkd`` or ``python -m tinyllava_switchkd.launch``; the scripts call it.
Nothing here imports torch or transformers, so that a command line is checked and shown (``DRY_RUN=1``) at once.
"""
