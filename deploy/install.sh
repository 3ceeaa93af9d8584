#!/usr/bin/env bash
# deploy/install.sh SET...: puts pinned sets of deploy/locks/ and this package into .venv. Does nothing when nothing changed; may be interrupted and
# run again. Settings: PYTHON (interpreter for the environment), OFFBEAT_VENV (its folder), and pip's own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${OFFBEAT_VENV:-.venv}
UV_PIN=uv==0.13.9
LOG=$VENV/install.log

say() { printf 'offbeat: %s\n' "$*"; }
fail() {
    printf 'offbeat: %s\n' "$*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 or newer, found none: install it (Debian: apt-get install python3 python3-venv) or set PYTHON=/path/to/python3.11"
}

make_venv() {
    if "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then return; fi
    local python
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make environments, its venv module is missing: install it (Debian: apt-get install python3-venv)"
    say "making $VENV with $("$python" --version)"
    "$python" -m venv --clear "$VENV"
}

# pip takes a package whose metadata is there for installed, also when it was killed while unpacking it; it writes INSTALLER last but one.
drop_half_installed() {
    local info
    for info in "$VENV"/lib/python3*/site-packages/*.dist-info; do
        if [[ -d $info && ! -e $info/INSTALLER ]]; then
            say "removing half-installed $(basename "$info" .dist-info)"
            rm -rf "$info"
        fi
    done
    rm -rf "$VENV"/lib/python3*/site-packages/~*
}

show_progress() { # stdin: pip's output; $1: number of packages
    awk -v total="$1" -v tty="$([[ -t 1 ]] && echo 1 || echo 0)" '
        /^ *(Collecting|Processing|Requirement already satisfied:)/ { n++; if (tty) { printf "\r  %d of %d  %-60.60s", n, total, $2; fflush() } }
        /^ *Installing collected packages/ && total > 1 { printf "%s  %-72s\n", tty ? "\r" : "", "unpacking " n " packages"; fflush() }'
}

pip_install() { # $1: number of packages; the rest: pip's arguments
    local total=$1
    shift
    "$VENV/bin/python" -m pip install --disable-pip-version-check --no-deps --no-build-isolation "$@" 2>&1 | tee -a "$LOG" | show_progress "$total"
}

show_failure() {
    tail -n 15 "$LOG" >&2
    fail "installing $1 failed; the whole log is $LOG. Run the same command again to go on from here"
}

# An index that holds CPU builds serves the exact pin. PyPI itself has only CUDA builds under that name: there uv knows PyTorch's own index.
install_torch() { # $1: the pin, torch==X+cpu
    if pip_install 1 "$1"; then return; fi
    grep -q 'No matching distribution found for torch' "$LOG" || show_failure torch
    say "the package index has no ${1}: taking PyTorch's own CPU build, by uv"
    pip_install 1 "$UV_PIN" || show_failure uv
    "$VENV/bin/python" -m uv pip install --python "$VENV/bin/python" --no-deps --torch-backend cpu "${1%+cpu}" 2>&1 | tee -a "$LOG" || show_failure torch
}

# $1: a Debian package, unpacked into the folder $2. No root needed; where the lists of packages are missing or old, into a copy of them.
unpack_debian() {
    local own=(-o "Dir::State::lists=$2/lists" -o "Dir::Cache=$2/cache" -o APT::Sandbox::User=root)
    (
        cd "$2" &&
            { apt-get download -q "$1" || { mkdir -p lists/partial && apt-get "${own[@]}" update -q && apt-get "${own[@]}" download -q "$1"; }; } &&
            dpkg-deb -x "$1"_*.deb .
    ) >>"$LOG" 2>&1
}

# vLLM's native part needs libnuma, which no Python package has: without it vLLM goes on without that part, and fails much later. Where the system
# has none, Debian's is put into the environment, and loaded when its Python starts: by then vLLM finds it by its name.
provide_libnuma() {
    if "$VENV/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; then return; fi
    say "the system has no libnuma, which vLLM needs: putting Debian's into $VENV"
    local folder
    folder=$(mktemp -d)
    if ! unpack_debian libnuma1 "$folder"; then
        rm -rf "$folder"
        fail "could not get libnuma: install it (Debian: apt-get install libnuma1), then run the same command again"
    fi
    cp -L "$folder"/usr/lib/*/libnuma.so.1 "$VENV/lib/"
    rm -rf "$folder"
    echo 'import ctypes, sys; ctypes.CDLL(sys.prefix + "/lib/libnuma.so.1")' >"$(echo "$VENV"/lib/python3*/site-packages)/offbeat_libnuma.pth"
}

# Tests of rules and dashboards ask a real Prometheus, which no Python package has. Its programs need nothing but libc.
provide_prometheus() {
    if PATH="$VENV/bin:$PATH" command -v prometheus >/dev/null && PATH="$VENV/bin:$PATH" command -v promtool >/dev/null; then return; fi
    say "the system has no Prometheus, which tests ask: putting Debian's into $VENV (19 MB)"
    local folder
    folder=$(mktemp -d)
    if unpack_debian prometheus "$folder"; then
        cp "$folder/usr/bin/prometheus" "$folder/usr/bin/promtool" "$VENV/bin/"
    else
        say "could not get Prometheus: tests that ask it are left out (for them: apt-get install prometheus)"
    fi
    rm -rf "$folder"
}

can_compile() {
    command -v cc >/dev/null &&
        "$VENV/bin/python" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())'
}

install_set() { # $1: name of a lock
    local lock=deploy/locks/$1.txt rest=$VENV/$1.txt total torch
    if [[ $1 == reasoning-gym ]] && ! can_compile; then
        say "no C compiler: data sources reasoning_gym:* left out (for them: apt-get install gcc python3-dev, then the same command again)"
        return
    fi
    total=$(grep -c == "$lock")
    say "installing $1: $total pinned packages$([[ $1 == cpu ]] && echo ', about 2.5 GB on disk, 1 to 5 minutes')"
    if [[ $1 == cpu ]]; then provide_libnuma; fi
    if [[ $1 == dev ]]; then provide_prometheus; fi
    torch=$(grep '^torch==' "$lock" || true)
    [[ -z $torch ]] || install_torch "$torch"
    grep -v '^torch==' "$lock" >"$rest"
    pip_install "$total" -r "$rest" || show_failure "$1"
    fingerprint "$lock" >"$VENV/.installed-$1"
}

fingerprint() { cat "$@" | sha256sum | cut -d ' ' -f 1; }
is_current() { # $1: name; the rest: the files that it depends on
    [[ -x $VENV/bin/python && "$(cat "$VENV/.installed-$1" 2>/dev/null)" == "$(fingerprint "${@:2}" 2>/dev/null)" ]]
}

sets=$(cd deploy/locks && echo *.txt | sed 's/\.txt//g')
[[ $# -gt 0 ]] || fail "which sets? there are: $sets"
for name in "$@"; do [[ -f deploy/locks/$name.txt ]] || fail "no set $name; there are: $sets"; done
mkdir -p "$VENV"
exec 9>"$VENV/.lock"
flock -n 9 || { say "another installation is running, waiting for it"; flock 9; }

missing=()
for name in "$@"; do is_current "$name" "deploy/locks/$name.txt" || missing+=("$name"); done
package=0
[[ ! -f pyproject.toml ]] || is_current offbeat pyproject.toml || package=1  # images get the package after the sets
if [[ ${#missing[@]} -eq 0 && $package -eq 0 ]]; then exit 0; fi

make_venv
: >"$LOG"
drop_half_installed
for name in "${missing[@]}"; do install_set "$name"; done
if [[ $package -eq 1 ]]; then
    pip_install 1 --editable . || show_failure offbeat
    fingerprint pyproject.toml >"$VENV/.installed-offbeat"
fi
say "installed in $SECONDS s"
