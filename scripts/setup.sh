#!/usr/bin/env bash
# Sets up everything the two README commands need on Debian or Ubuntu: system packages and .venv.
# Safe to run again; does nothing, and needs no network, when all is there. With --more it also brings
# what tests of a second PKCS#11 module need; tpm2-abrmd among it comes with a service of its own.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly VENV=.venv
readonly STAMP=$VENV/.spire-hw-setup
PACKAGES=(
  ca-certificates gcc g++ libc6-dev make openssl pkg-config procps python3 python3-dev python3-venv
  swtpm swtpm-tools tpm2-tools libtss2-dev
  softhsm2 opensc p11-kit
)

readonly MORE=(libtpm2-pkcs11-1 libtpm2-pkcs11-tools tpm2-abrmd libtss2-tcti-tabrmd0 dbus libglib2.0-bin)
[ "${1:-}" = --more ] && PACKAGES+=("${MORE[@]}")
readonly PACKAGES

say() { printf '==> %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

missing_packages() {
  local name
  for name in "${PACKAGES[@]}"; do
    dpkg-query -W -f '${Status}' "$name" 2>/dev/null | grep -q '^install ok installed$' || echo "$name"
  done
  # The TCTI for swtpm has another package name on each release.
  if ! compgen -G '/usr/lib/*/libtss2-tcti-swtpm.so.0*' >/dev/null; then
    { apt-cache search --names-only '^libtss2-tcti-swtpm0' 2>/dev/null || true; } |
      awk 'NR == 1 {print $1} END {if (NR == 0) print "libtss2-tcti-swtpm0"}'
  fi
}

install_packages() {
  local -a missing as_root=()
  if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    fail "this script knows Debian and Ubuntu only. Install what these packages hold by hand:
  ${PACKAGES[*]}"
  fi
  mapfile -t missing < <(missing_packages)
  [ ${#missing[@]} -eq 0 ] && return
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null ||
      fail "system packages are missing, and this is neither root nor is there sudo. As root:
  apt-get install ${missing[*]}"
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

# The distribution's own Python first: its ssl module uses the system's OpenSSL.
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

# What .venv depends on: the place, the interpreter, and what is to be installed.
fingerprint() {
  "$1" - <<'PYTHON'
import hashlib, os, sys, tomllib

with open("pyproject.toml", "rb") as file:
    held = tomllib.load(file)
parts = [os.getcwd(), sys.version, held["build-system"], held["project"], held["tool"]["hatch"]]
print(hashlib.sha256(repr(parts).encode()).hexdigest())
PYTHON
}

# A moved checkout or an upgraded Python leaves a .venv whose scripts point nowhere.
venv_works() {
  "$VENV/bin/python" -m pip --version >/dev/null 2>&1 && "$VENV/bin/pip" --version >/dev/null 2>&1
}

make_venv() {
  local python said wanted
  python=$(find_python)
  wanted=$(fingerprint "$python")
  if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$wanted" ] && "$VENV/bin/python" -c '' 2>/dev/null; then
    return
  fi
  say "installing Python packages into $VENV with $("$python" --version); this takes a minute or two"
  venv_works || "$python" -m venv --clear "$VENV"
  if ! said=$(PIP_RETRIES=${PIP_RETRIES:-2} "$VENV/bin/python" -m pip install -q --disable-pip-version-check -e '.[dev]' 2>&1); then
    printf '%s\n' "$said" | { grep -E 'ERROR|WARNING: Retrying|No matching' || true; } | tail -n 4 >&2
    fail "Python packages could not be installed. Is the package index reachable?
  Behind a mirror, set PIP_INDEX_URL; what is wanted stands in pyproject.toml."
  fi
  # The simulator is a development tool: it is not in the wheel, so it has no entry point there.
  cat > "$VENV/bin/spire-hw-sim" <<'LAUNCHER'
#!/bin/sh
exec "$(dirname "$0")/python" -m spire_hw_sim "$@"
LAUNCHER
  chmod 755 "$VENV/bin/spire-hw-sim"
  printf '%s' "$wanted" > "$STAMP"
}

# Two makes at once would install into each other.
exec 9< scripts/setup.sh
flock 9
install_packages
make_venv
say "set up: $("$VENV/bin/python" --version), $(swtpm --version 2>/dev/null | head -n 1 | cut -d, -f1)"
