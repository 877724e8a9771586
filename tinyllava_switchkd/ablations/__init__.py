"""The paper's ablation tables and the comparison of methods, each by one command.

`tables` defines the runs of each table, `toy` makes them at quickstart scale, `paper` at full scale, and `summary`
computes means, paired differences and intervals. The command is ``python -m tinyllava_switchkd.ablations TABLE``; the
scripts scripts/train/ablate_*.sh and compare_methods.sh call it.
"""
