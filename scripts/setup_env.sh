# shellcheck shell=bash
# Sourced by scripts that need an environment: creates .venv at the repository's root and installs the package in it.
#
#   source scripts/setup_env.sh; setup_env train,eval     # the extras
#
# Afterwards the virtual environment is active. A second call is quick: a stamp in .venv records the installed extras and
# their pyproject.toml. uv is used if it is available. PYTHON chooses the interpreter.

setup_env() {
    local root python extras stamp wanted
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    extras="$1"
    stamp="$root/.venv/.tinyllava_switchkd"
    wanted="$extras $(cksum <"$root/pyproject.toml")"

    if [ ! -x "$root/.venv/bin/python" ]; then
        python="${PYTHON:-python3}"
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "error: '$python' is not Python 3.10 or newer; set PYTHON to one that is." >&2
            return 1
        fi
        echo "Creating a virtual environment in .venv ..."
        if command -v uv >/dev/null 2>&1; then
            uv venv --quiet --python "$python" "$root/.venv" || return 1
        else
            "$python" -m venv "$root/.venv" || return 1
        fi
    fi
    if [ ! -f "$stamp" ] || ! grep -qxF "$wanted" "$stamp"; then
        echo "Installing tinyllava_switchkd[$extras] into .venv (about two minutes the first time) ..."
        if command -v uv >/dev/null 2>&1; then
            uv pip install --quiet --python "$root/.venv/bin/python" -e "${root}[$extras]" || return 1
        else
            "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "${root}[$extras]" || return 1
        fi
        echo "$wanted" >>"$stamp"
    fi
    # shellcheck disable=SC1091
    source "$root/.venv/bin/activate"
}
