"""Run by `spawn`: a process that only reports an error, as an evaluation does."""

import os
import signal
import sys

from tinyllava_switchkd.eval.processes import tell

rank = int(os.environ["RANK"])
tell(f"[process {rank}] error: a broken picture", rank)
print("a library has something to say", file=sys.stderr, flush=True)
if sys.argv[1:] == ["killed"] and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(1 if rank == 1 else 0)
