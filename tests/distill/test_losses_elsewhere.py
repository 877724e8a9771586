"""The losses copied into another project: the folder and registry.py, one import changed."""

import shutil
import subprocess
import sys
from pathlib import Path

import tinyllava_switchkd

PROGRAM = """
import sys
import torch
from other.losses import LossFactory
torch.manual_seed(0)
sides = torch.randn(2, 3, 5000)
for name in LossFactory.list():
    assert LossFactory(name)()(*sides).isfinite().all(), name
assert "dbild" in LossFactory.list() and not any(name.startswith("tinyllava_switchkd") for name in sys.modules)
"""


def test_the_losses_work_in_another_project(tmp_path):
    package, other = Path(tinyllava_switchkd.__file__).parent, tmp_path / "other"
    shutil.copytree(package / "distill" / "losses", other / "losses")
    shutil.copy(package / "registry.py", other)
    base = other / "losses" / "base.py"
    base.write_text(base.read_text().replace("tinyllava_switchkd.registry", "other.registry"))
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
