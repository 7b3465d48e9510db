# shellcheck shell=bash
# Sourced by tests/run and tools/demo. From a fresh Debian or Ubuntu to a virtual environment that
# has SluiceFS and what the caller needs. Needs bash and `set -e`; sets nothing but functions.
#
#   setup_environment EXTRA    (test or demo) .venv/bin/python and .venv/bin/sluice work afterwards

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
    say "$*"
    exit 1
}

# Print a Python that is new enough: $PYTHON, python3, or a versioned one.
find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# Print the Debian packages that are missing, one a line. pyfuse3 comes as source: it needs a compiler,
# Python's headers and libfuse's.
missing_packages() {
    local python
    command -v fusermount3 >/dev/null || echo fuse3
    command -v gcc >/dev/null || echo gcc
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists fuse3 2>/dev/null || echo libfuse3-dev
    if ! python=$(find_python); then
        printf '%s\n' python3 python3-dev python3-venv
        return
    fi
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || echo python3-dev
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "needs root for '$*', and there is no sudo; run it yourself and start again"
    fi
}

install_packages() {
    local packages
    mapfile -t packages < <(missing_packages)
    if [ ${#packages[@]} -gt 0 ]; then
        command -v apt-get >/dev/null ||
            die "missing: ${packages[*]} (Debian's names); there is no apt-get here, install them yourself"
        say "installing ${packages[*]}"
        quietly as_root apt-get update
        quietly as_root env DEBIAN_FRONTEND=noninteractive \
            apt-get install -y --no-install-recommends "${packages[@]}"
        mapfile -t packages < <(missing_packages)
        [ ${#packages[@]} -eq 0 ] || die "still missing after apt-get install: ${packages[*]}"
    fi
    [ -e /dev/fuse ] || die "/dev/fuse is not there: load the fuse module, or give the container the device"
}

# Print what the environment was made from: it is made anew when this changes.
fingerprint() {
    local file
    "$1" -c 'import sys; print(sys.version, sys.prefix, sys.base_prefix)'
    for file in setup.cfg setup.py pyproject.toml sluicefs.py fusefs/*.[ch]; do
        if [ -e "$file" ]; then sha256sum "$file"; fi
    done
}

# Run a command; show what it printed only when it fails.
quietly() {
    local log
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        die "failed: $*"
    fi
    rm -f "$log"
}

# An editable install: the tests, the checkers and the command then all see this checkout, and the C
# extension is built in place. tests/test_02_packaging.py builds and installs the wheel a user gets.
install_python_packages() {
    local extra=$1 python stamp
    python=$(find_python) || die "no Python 3.11 or newer was found; name one with PYTHON=..."
    if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c 'import pip' 2>/dev/null; then
        say "making .venv with $python"
        rm -rf .venv
        "$python" -m venv .venv
    fi
    stamp=.venv/installed-$extra
    if [ ! -e "$stamp" ] || [ "$(cat "$stamp")" != "$(fingerprint .venv/bin/python)" ]; then
        say "installing SluiceFS and its [$extra] packages into .venv"
        quietly .venv/bin/python -m pip install --disable-pip-version-check --upgrade 'pip>=23'
        quietly .venv/bin/python -m pip install --disable-pip-version-check --editable ".[$extra]"
        fingerprint .venv/bin/python >"$stamp"
    fi
}

setup_environment() {
    # A training repository's PYTHONPATH must not decide what runs here.
    unset PYTHONPATH PYTHONHOME
    install_packages
    install_python_packages "$1"
}
