"""Imported last by the server that processes are forked from: garbage collectors of these pass over what it imported.

Every training asks for a full collection, which would otherwise take a third of a short one.
"""

import gc

gc.collect()
gc.freeze()
