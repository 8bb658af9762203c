#!/usr/bin/env bash
# From a machine with Python 3.11+ and pip to a leakage report, in minutes. Run it again: it continues, or says it is done.
#   launch/quickstart.sh [all] [--config.key=value ...]      all: every technique instead of kd alone
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh
setup_environment requirements.txt
variant="" workdir=runs/quickstart
if [ "${1:-}" = all ]; then
    variant=:all workdir=runs/quickstart_all
    shift
fi
exec python main.py --config=configs/quickstart.py$variant --workdir=$workdir "$@"
