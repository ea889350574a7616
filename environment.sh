# Make .venv with the packages of a requirements file, once, and put it on the PATH. Sourced by run.sh and test.sh.
prepare_environment() {
    local requirements=$1 stamp
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "error: Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 2; }

    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    stamp=".venv/$(cat pyproject.toml requirements.txt "$requirements" | cksum | tr ' ' -).installed"
    if [ ! -e "$stamp" ]; then
        echo "+ pip install -r $requirements (once; the first time a few minutes)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
        touch "$stamp"
    fi
    PATH="$PWD/.venv/bin:$PATH"
}
