"""Tests are offline: names that only the hub could know must fail at once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
