"""``python -m tinyllava_switchkd.serve.cli``: TinyLLaVA v1's name for `tinyllava_switchkd.serve.chat`."""

import sys

from tinyllava_switchkd.serve.chat import main

if __name__ == "__main__":
    sys.exit(main())
