#!/usr/bin/env bash
# Sets up everything the two README commands need on Debian or Ubuntu: system packages and .venv.
# Safe to run again; does nothing, and needs no network, when all is there.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly VENV=.venv
readonly PACKAGES=(
  ca-certificates gcc g++ libc6-dev make openssl pkg-config procps python3 python3-dev python3-venv
  swtpm swtpm-tools tpm2-tools libtss2-dev
  softhsm2 opensc p11-kit
)

say() { printf '\033[1m==>\033[0m %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

missing_packages() {
  local name
  for name in "${PACKAGES[@]}"; do
    dpkg-query -W -f '${Status}' "$name" 2>/dev/null | grep -q '^install ok installed$' || echo "$name"
  done
  # The swtpm TCTI is part of libtss2 on old releases and a package of its own on newer ones.
  if ! ls /usr/lib/*/libtss2-tcti-swtpm.so.0 >/dev/null 2>&1; then
    apt-cache search --names-only '^libtss2-tcti-swtpm0' 2>/dev/null | cut -d' ' -f1 | head -n 1 | grep . ||
      echo libtss2-tcti-swtpm0
  fi
}

install_packages() {
  command -v apt-get >/dev/null || fail "apt-get is not here: this script knows Debian and Ubuntu only.
  Install by hand: ${PACKAGES[*]}"
  local missing
  mapfile -t missing < <(missing_packages)
  [ ${#missing[@]} -eq 0 ] && return
  local -a as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || fail "not root and no sudo. Ask an administrator for: ${missing[*]}"
    as_root=(sudo)
  fi
  say "installing system packages: ${missing[*]}"
  "${as_root[@]}" apt-get update -qq || say "package lists could not be refreshed, going on with the old ones"
  mapfile -t missing < <(missing_packages)
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
    fail "system packages could not be installed: ${missing[*]}
  Is there a network, and are the package sources right (apt-get update)?"
}

# The first Python from 3.11 on, the distribution's own first: its ssl module uses the system's OpenSSL.
find_python() {
  local candidate
  for candidate in ${PYTHON:-} /usr/bin/python3 python3.13 python3.12 python3.11 python3; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail "Python 3.11 or newer with venv is needed; set PYTHON to its path"
}

make_venv() {
  local python stamp wanted
  stamp=$VENV/.spire-hw-setup
  wanted=$(cat pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1)
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    return
  fi
  python=$(find_python)
  say "making $VENV with $("$python" --version)"
  [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV"
  "$VENV/bin/python" -m pip install -q --disable-pip-version-check -e '.[dev]' ||
    fail "Python packages could not be installed. Is the package index reachable?"
  # The simulator is a development tool: it is not in the wheel, so it has no entry point there.
  cat > "$VENV/bin/spire-hw-sim" <<LAUNCHER
#!/bin/sh
exec "\$(dirname "\$0")/python" -m spire_hw_sim "\$@"
LAUNCHER
  chmod 755 "$VENV/bin/spire-hw-sim"
  printf '%s' "$wanted" > "$stamp"
}

install_packages
make_venv
say "set up: $("$VENV/bin/python" --version), $(swtpm --version 2>/dev/null | head -n 1 | cut -d, -f1)"
