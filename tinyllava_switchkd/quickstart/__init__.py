"""The quickstart: the paper's story at toy scale, on a CPU, through the project's own scripts and entry points.

Nothing in here trains: `scenes` writes data, `base_models` writes tiny model folders, `experiment` calls the entry
point of training, `evaluate` asks the checkpoints that come out, and `report` lays their answers side by side.
"""
