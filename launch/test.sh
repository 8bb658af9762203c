#!/usr/bin/env bash
# The whole test suite, ending with a table of the scientific checks. Extra arguments go to pytest, which
# runs two files at a time (-n 0: one after the other).
#   launch/test.sh [-k head ...]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh
setup_environment requirements-test.txt
ruff check --quiet . && ruff format --check --quiet .
exec python -m pytest -q -n 2 --dist=loadfile "$@"
