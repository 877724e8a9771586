"""The paper's tables of ablations and the comparison with rivals, each by one command.

`tables` says which runs a table has, `toy` makes them at quickstart scale, `paper` at full scale, `summary` turns
numbers into means, paired differences and intervals. The command is ``python -m tinyllava_switchkd.ablations TABLE``,
which scripts/train/ablate_*.sh and compare_methods.sh call.
"""
