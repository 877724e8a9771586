"""The name that ``python -m tinyllava_switchkd.train.check_data`` had at first; scripts that use it go on working."""

import runpy

if __name__ == "__main__":
    runpy.run_module("tinyllava_switchkd.train.check_data", run_name="__main__")
