#!/usr/bin/env bash
# Make the environment of run.sh, with the test tools, and run the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
. ./environment.sh
prepare_environment requirements-dev.txt

# A test needs one core; several run at once.
OMP_NUM_THREADS=1 python -m pytest -q -n logical --maxprocesses 4 "$@"
