#!/usr/bin/env bash
# Does a student give the same answers in OpenVINO as here? bash scripts/export/check_openvino.sh STUDENT
#
# Exports it, creates an environment with optimum-intel and OpenVINO from the package index (about 6 GB), and asks both
# the same questions. compare.sh has more variables.
#
#   OPENVINO_ENV       the environment ($TMPDIR/env-openvino, or /tmp/env-openvino)
# shellcheck source=compare.sh
. "$(dirname "${BASH_SOURCE[0]}")/compare.sh"
environment="${OPENVINO_ENV:-${TMPDIR:-/tmp}/env-openvino}"
if ! "$environment/bin/python" -c "import optimum.intel, openvino" 2> /dev/null; then
    "$python" -m venv "$environment"
    "$environment/bin/pip" install "optimum-intel[openvino]>=2.2"
fi
compare hf-llava "$1" "$environment" check_openvino.py
