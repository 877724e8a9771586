#!/bin/bash
# Where and on what DBiLD searches the knee, and which pairs it compares.
# SCALE=quickstart (this machine) or paper, SEEDS=5, DRY_RUN=1 for memory and hours, ABLATE_OUT: docs/results.md.
# shellcheck source=../launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
ablate knee "$@"
