#!/usr/bin/env bash
# Tests the packages that `python -m build` wrote to dist/, without the repository: bash scripts/check_package.sh
#   PYTHON          the interpreter for the virtual environments
#   PIP_ARGUMENTS   arguments of pip install, e.g. "--no-deps" with SYSTEM_SITE=1 to use installed packages
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
elsewhere="$(mktemp -d)"
trap 'rm -rf "$elsewhere"' EXIT
unset PYTHONPATH

for package in "$root"/dist/*.whl "$root"/dist/*.tar.gz; do
    [ -f "$package" ] || { echo "error: there is no $package; run 'python -m build' first." >&2; exit 1; }
    environment="$elsewhere/$(basename "$package").env"
    "$python" -m venv ${SYSTEM_SITE:+--system-site-packages} "$environment"
    # shellcheck disable=SC2086 # may hold several words
    "$environment/bin/python" -m pip install --quiet ${PIP_ARGUMENTS:-} "$package"
    (
        cd "$elsewhere"
        PATH="$environment/bin:$PATH"
        python -c "import tinyllava_switchkd as package; assert '$environment' in package.__file__, package.__file__"
        tinyllava-switchkd recipes
        DEVICE=cpu DRY_RUN=1 tinyllava-switchkd train --recipe debug >/dev/null
        CUDA_VISIBLE_DEVICES=0,1 DRY_RUN=1 tinyllava-switchkd train --recipe llava_kd | grep deepspeed/zero2.json >/dev/null
        DEVICE=cpu DRY_RUN=1 tinyllava-switchkd eval pope some/model >/dev/null
        tinyllava-switchkd score --help >/dev/null
        python -m tinyllava_switchkd.train.train --help >/dev/null
    )
    echo "$(basename "$package") works without the repository."
done
