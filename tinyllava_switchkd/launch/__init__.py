"""Starting trainings and evaluations: devices, launchers, batch arithmetic, stages and recipes.

``tinyllava-switchkd`` and ``python -m tinyllava_switchkd.launch`` are the command, which scripts/train and scripts/eval
call.
Nothing here imports torch or transformers, so that a command line is checked and shown (``DRY_RUN=1``) at once.
"""
