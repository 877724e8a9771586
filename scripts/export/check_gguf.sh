#!/usr/bin/env bash
# Does a student give the same answers in llama.cpp as here? bash scripts/export/check_gguf.sh STUDENT [DTYPE]
#
# Exports it, creates an environment with llama-cpp-python from the package index (a compiler and CMake build llama.cpp,
# which takes minutes), and asks both the same questions. compare.sh has more variables.
#
#   LLAMA_ENV          the environment ($TMPDIR/env-llama, or /tmp/env-llama)
# shellcheck source=compare.sh
. "$(dirname "${BASH_SOURCE[0]}")/compare.sh"
environment="${LLAMA_ENV:-${TMPDIR:-/tmp}/env-llama}"
if ! "$environment/bin/python" -c "import llama_cpp, jinja2" 2> /dev/null; then
    "$python" -m venv "$environment"
    "$environment/bin/pip" install "llama-cpp-python>=0.3.36"
fi
compare gguf "$1" "$environment" check_gguf.py --dtype "${2:-f32}" --allow_approximate
