#!/usr/bin/env bash
# Runs a student in the browser, without a model on the server: bash scripts/web_demo.sh [PORT]
#
# Exports a student to ONNX, installs transformers.js from npm into playground/web, and serves that folder on 127.0.0.1.
#
#   STUDENT            the checkpoint (a folder or hub name); default: the quickstart's Switch-KD student
#   DTYPES             precisions to export ("fp32 int8 q4"); the page starts with the first
#   QUICKSTART_OUT     the quickstart's folder (playground/quickstart)
#   WEB_ROOT           the folder to serve (playground/web)
#   SERVE              0: prepare everything, but do not serve it
#   TINYLLAVA_PYTHON   an interpreter with all dependencies; then no .venv is made
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="${QUICKSTART_OUT:-$root/playground/quickstart}"
web="${WEB_ROOT:-$root/playground/web}"
port="${1:-8080}"

fail() {
    echo "error: $1" >&2
    exit 1
}

student="${STUDENT:-}"
if [ -z "$student" ]; then
    for folder in "$out"/checkpoints/*-distill; do
        if [ -f "$folder/config.json" ]; then
            student="$folder"
            break
        fi
    done
    [ -n "$student" ] || fail "there is no Switch-KD student in $out/checkpoints; run 'bash scripts/quickstart.sh' first, or set STUDENT: STUDENT=FOLDER bash scripts/web_demo.sh"
fi
command -v npm > /dev/null || fail "npm is missing; install Node.js 18 or newer."

if [ -n "${TINYLLAVA_PYTHON:-}" ]; then
    python="$TINYLLAVA_PYTHON"
else
    # shellcheck source=scripts/setup_env.sh
    source "$root/scripts/setup_env.sh"
    if [ -z "${STUDENT:-}" ]; then
        setup_env export,train # the quickstart draws the sample pictures, with scikit-learn's digits
    else
        setup_env export
    fi
    python="$root/.venv/bin/python"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

if [ "$web" != "$root/playground/web" ]; then
    mkdir -p "$web"
    cp "$root"/playground/web/*.* "$web/"
fi
if ! cmp -s "$web/package.json" "$web/vendor/package.json"; then # the libraries of another version, or none
    # The page needs no native library, so onnxruntime-node's download is skipped.
    (cd "$web" && ONNXRUNTIME_NODE_INSTALL=skip npm install --no-audit --no-fund)
    mkdir -p "$web/vendor"
    cp "$web/node_modules/@huggingface/transformers/dist/transformers.min.js" "$web/vendor/"
    cp "$web"/node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.{mjs,wasm} "$web/vendor/"
    cp "$web/package.json" "$web/vendor/"
fi

mkdir -p "$web/models"
read -r -a dtypes <<< "${DTYPES:-fp32 int8 q4}"
new="$(mktemp -d "$web/models/.new.XXXXXX")" # a failed export keeps the previous student
trap 'rm -rf "$new"' EXIT
"$python" -m tinyllava_switchkd.model.export --to onnx "$student" "$new/student" --dtype "${dtypes[@]}"
rm -rf "$web/models/student"
mv "$new/student" "$web/models/student"
rm -rf "$new"
trap - EXIT
if [ -z "${STUDENT:-}" ]; then
    "$python" "$root/scripts/export/web_samples.py" "$web/models"
else
    rm -f "$web/models/samples.json"
fi

if [ "${SERVE:-1}" = 0 ]; then
    exit 0
fi
echo "Open http://127.0.0.1:$port/ (Ctrl-C ends it)"
exec "$python" -m http.server "$port" --bind 127.0.0.1 --directory "$web"
