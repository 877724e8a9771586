"""The old name of ``python -m tinyllava_switchkd.train.check_data``, kept for existing scripts."""

import runpy

if __name__ == "__main__":
    runpy.run_module("tinyllava_switchkd.train.check_data", run_name="__main__")
