"""The quickstart: the paper's experiment at toy scale on a CPU, run through the project's own entry points.

`scenes` writes data, `base_models` writes tiny model folders, `experiment` calls the training entry point, `evaluate`
asks the checkpoints, and `report` compares their answers.
"""
