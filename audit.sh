#!/usr/bin/env bash
# Look up known vulnerabilities of the packages in requirements.txt and of all they pull in (needs the internet).
# Fails on every finding that is not stated here, and on every package that could not be looked up.
set -euo pipefail
cd "$(dirname "$0")"
. ./environment.sh
prepare_environment requirements-dev.txt

# Findings that do not concern this code, each with the reason: stated+=(--ignore-vuln ID)
stated=()

# All but the package of this repository, which no database knows.
pip-audit --strict --progress-spinner off --requirement <(grep -v '^-e ' requirements.txt) \
    ${stated[@]+"${stated[@]}"} "$@"
