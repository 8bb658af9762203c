#!/usr/bin/env bash
# From a machine with Python 3.11+ and pip to a leakage report, in minutes. Run it again: it continues, or says it is done.
#   launch/quickstart.sh [--config.key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh
setup_environment requirements.txt
exec python main.py --config=configs/quickstart.py --workdir=runs/quickstart "$@"
