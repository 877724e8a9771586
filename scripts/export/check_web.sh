#!/usr/bin/env bash
# Does the student give the same answers in a browser and in Node as in Python? bash scripts/export/check_web.sh
#
# Prepares the page (by scripts/web_demo.sh, with the same environment variables) and runs the tests that need it. The
# browser tests need chromium, and playwright for Python (in the extra dev).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export WEB_ROOT="${WEB_ROOT:-$root/playground/web}"
SERVE=0 bash "$root/scripts/web_demo.sh"
cd "$root"
exec "${TINYLLAVA_PYTHON:-$root/.venv/bin/python}" -m pytest tests/model/test_export_web.py -p no:cacheprovider "$@"
