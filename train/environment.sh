# Sourced by train/quickstart.sh and tests/run.sh: a virtual environment in .venv with the tested versions, made once,
# brought up to date when pyproject.toml or configs/constraints.txt change. PYTHON names another interpreter.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "error: $*" >&2
    exit 1
}

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "$python not found: install Python 3.11 or newer, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old: Python 3.11 or newer is needed (PYTHON=python3.12 $0)"

wanted=$(cat pyproject.toml configs/constraints.txt train/environment.sh | sha256sum | cut -d' ' -f1)
if [ "$(cat .venv/installed 2>/dev/null || true)" != "$wanted" ]; then
    echo "Setting up .venv (once; torch with its GPU libraries is several GB) …"
    if [ ! -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        # Debian splits ensurepip off; where pip itself is there, it can bring one into the environment.
        "$python" -m venv .venv >/dev/null 2>&1 ||
            { "$python" -m venv --without-pip --clear .venv &&
                "$python" -m pip --quiet --python .venv/bin/python install pip; } ||
            fail "$python cannot make a virtual environment: install its venv module (Debian: apt install python3-venv)"
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c configs/constraints.txt -e '.[test]' ||
        fail "pip could not install the requirements: its messages above say why; run this again when that is mended"
    echo "$wanted" >.venv/installed
fi
export PATH="$PWD/.venv/bin:$PATH"
