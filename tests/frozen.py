"""Imported last by the fork server, so that garbage collection in its child processes skips everything imported before.

Every training runs a full collection, which would otherwise take a third of the time of a short training.
"""

import gc

gc.collect()
gc.freeze()
