"""No test asks a hub: names that only a hub could know must fail at once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
