#!/usr/bin/env bash
# system-packages PACKAGE...: installs those of these Debian packages that the image lacks. An image that has them needs no network.
set -euo pipefail
missing=()
for package in "$@"; do
    dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
[[ ${#missing[@]} -gt 0 ]] || exit 0
apt-get update -q
DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
rm -rf /var/lib/apt/lists/*
