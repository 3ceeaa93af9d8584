#!/usr/bin/env bash
# deploy/install.sh SET...: puts pinned sets of deploy/locks/ and this package into .venv. Does nothing when nothing changed; may be interrupted and
# run again. Settings: PYTHON (interpreter for the environment), OFFBEAT_VENV (its folder), and pip's own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${OFFBEAT_VENV:-.venv}
UV_PIN=uv==0.13.9
LOG=$VENV/install.log
DEBIAN=$(realpath -m "$VENV")/debian  # what is fetched from Debian, while it is unpacked

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
    rm -rf "$VENV"/lib/python3*/site-packages/~* "$DEBIAN"
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

# $1: the folder to unpack Debian packages into; the rest: what apt-get is asked for them. No root needed: what is fetched lies beside that folder, and
# where the lists of packages are missing or old, a copy of them. Who calls it removes $DEBIAN; one that was killed leaves it to the next.
unpack_debian() {
    local package own=(-q -o "Dir::Cache=$DEBIAN/cache" -o "Dir::Cache::archives=$DEBIAN" -o Debug::NoLocking=true -o APT::Sandbox::User=root)
    local lists=(-o "Dir::State::lists=$DEBIAN/lists")
    mkdir -p "$1" "$DEBIAN"/{partial,cache,lists/partial}
    (
        cd "$DEBIAN" &&
            { apt-get "${own[@]}" "${@:2}" || { apt-get "${own[@]}" "${lists[@]}" update && apt-get "${own[@]}" "${lists[@]}" "${@:2}"; }; } &&
            for package in *.deb; do dpkg-deb -x "$package" "$1" || exit 1; done
    ) >>"$LOG" 2>&1
}

# $1: a library, put into the environment from the Debian package $2 where the system has none; $3: what needs it.
provide_library() {
    if "$VENV/bin/python" -c "import ctypes; ctypes.CDLL('$1')" 2>/dev/null; then return; fi
    say "the system has no ${1%.so*}, which $3 needs: putting Debian's into $VENV"
    unpack_debian "$DEBIAN/unpacked" download "$2" && cp -L "$DEBIAN"/unpacked/usr/lib/*/"$1" "$VENV/lib/" && rm -rf "$DEBIAN"
}

# No Python package has libnuma, and without it vLLM goes on without its native part, and fails much later. So it is loaded when the environment's
# Python starts: by then vLLM finds it by its name.
provide_libnuma() {
    provide_library libnuma.so.1 libnuma1 vLLM ||
        fail "could not get libnuma: install it (Debian: apt-get install libnuma1), then run the same command again"
    if [[ -e $VENV/lib/libnuma.so.1 ]]; then
        echo 'import ctypes, sys; ctypes.CDLL(sys.prefix + "/lib/libnuma.so.1")' >"$(echo "$VENV"/lib/python3*/site-packages)/offbeat_libnuma.pth"
    fi
}

has() { # any of these programs
    local program
    for program in "$@"; do if PATH="$VENV/bin:$PATH" command -v "$program" >/dev/null; then return; fi; done
    return 1
}

# Tests of rules and dashboards ask a real Prometheus, which no Python package has. Its programs need nothing but libc.
provide_prometheus() {
    if has prometheus && has promtool; then return; fi
    say "the system has no Prometheus, which tests ask: putting Debian's into $VENV (19 MB)"
    if unpack_debian "$DEBIAN/unpacked" download prometheus; then
        cp "$DEBIAN/unpacked/usr/bin/prometheus" "$DEBIAN/unpacked/usr/bin/promtool" "$VENV/bin/"
    else
        say "could not get Prometheus: tests that ask it are left out (for them: apt-get install prometheus)"
    fi
    rm -rf "$DEBIAN"
}

# Tests of the page drive Chromium: the one that opens no window, with a font and those of its libraries that the system lacks. They do it by
# Playwright, whose Node wants libatomic.
provide_chromium() {
    provide_library libatomic.so.1 libatomic1 Playwright || say "could not get libatomic: tests of the page may fail (Debian: apt-get install libatomic1)"
    if has chromium chromium-browser chromium-headless-shell google-chrome; then return; fi
    say "the system has no Chromium, which tests of the page drive: putting Debian's into $VENV (110 to 170 MB to fetch, 300 to 500 MB on disk)"
    if unpack_chromium && try_chromium >>"$LOG" 2>&1; then
        rm -rf "$VENV/share/chromium"
        mkdir -p "$VENV/share"
        mv "$DEBIAN/chromium" "$VENV/share/chromium"
        ln -sf ../share/chromium/chromium "$VENV/bin/chromium"
    else
        say "could not get Chromium: tests of the page are left out (for them: apt-get install chromium)"
    fi
    rm -rf "$DEBIAN"
}

# apt-get takes two programs for installed that Chromium calls on desktops only: half of X and LLVM stand behind them, 50 MB to fetch.
unpack_chromium() {
    local made=$DEBIAN/chromium root=$DEBIAN/unpacked
    mkdir -p "$made/libraries"
    { cat /var/lib/dpkg/status && printf '\nPackage: %s\nStatus: install ok installed\nVersion: 999\nArchitecture: all\n' x11-utils xdg-utils; } \
        >"$DEBIAN/status" 2>>"$LOG" || return
    unpack_debian "$root" install -y --download-only --no-install-recommends -o "Dir::State::status=$DEBIAN/status" \
        chromium-headless-shell fonts-dejavu-core || return
    find "$root" -path '*-linux-gnu*' -name '*.so*' -exec mv -t "$made/libraries" {} \; &&
        mv "$root/usr/lib/chromium" "$made/program" && mv "$root/usr/share/fonts" "$made/fonts" || return
    cat >"$made/fonts.conf" <<'END'
<fontconfig>
  <include ignore_missing="yes">/etc/fonts/fonts.conf</include>
  <dir prefix="relative">fonts</dir>
  <cachedir prefix="xdg">fontconfig</cachedir>
  <alias><family>monospace</family><prefer><family>DejaVu Sans Mono</family></prefer></alias>
</fontconfig>
END
    cat >"$made/chromium" <<'END'
#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
export LD_LIBRARY_PATH="$here/libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" FONTCONFIG_FILE="$here/fonts.conf"
exec "$here/program/chromium-headless-shell" "$@"
END
    chmod +x "$made/chromium"
}

try_chromium() {
    timeout 120 "$DEBIAN/chromium/chromium" --no-sandbox --disable-gpu --dump-dom 'data:text/html,<p>it runs' | grep 'it runs'
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
    if [[ $1 == dev ]]; then provide_prometheus; provide_chromium; fi
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
