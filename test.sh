#!/usr/bin/env bash
# Make the environment of run.sh, with the test tools, and run the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
. ./environment.sh
prepare_environment requirements-dev.txt

python -m pytest -q "$@"
