# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: a virtual environment with the given requirements, made once.
#   setup_environment REQUIREMENTS_FILE
# VENV names its folder (default .venv), PYTHON the interpreter (default python3).

# Much of what is left on a CPU is page faults of large temporaries: huge pages take 10 to 20 % off a training step.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

setup_environment() {
    local requirements=$1 venv=${VENV:-.venv} python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'; then
        echo "error: Python 3.11 to 3.13 is needed; $python is $("$python" --version 2>&1). Set PYTHON=..." >&2
        return 1
    fi
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    # shellcheck disable=SC1091
    . "$venv/bin/activate"
    local wanted stamp
    wanted=$(cat requirements.txt "$requirements")
    stamp=$venv/.installed-${requirements##*/}
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        echo "Installing $requirements into $venv ..."
        pip install --quiet --disable-pip-version-check -r "$requirements"
        printf '%s\n' "$wanted" >"$stamp"
    fi
}
