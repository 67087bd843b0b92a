#!/usr/bin/env bash
# Makes what `make test-vm` boots, in build/vm: a Debian root file system with this project's wheel,
# a signed kernel with boot loaders, firmware, and an initial RAM disk. Nothing but qemu and the tools
# to make images is installed on this machine; the rest is unpacked from the guest's packages.
# Does nothing when all is there and the project's sources did not change.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly OUT=build/vm
readonly PY=.venv/bin/python
readonly PACKAGES=(qemu-system-x86 mmdebstrap mtools e2fsprogs cpio)
readonly GUEST=python3,libtss2-mu0,libtss2-tctildr0,libtss2-tcti-device0,iproute2
readonly UNPACKED=(linux-image-cloud-amd64 shim-signed grub-efi-amd64-signed ovmf busybox-static)

say() { printf '==> %s\n' "$*"; }
fail() { printf 'vm-image: %s\n' "$*" >&2; exit 1; }

install_tools() {
  local name
  local -a missing=() as_root=()
  for name in "${PACKAGES[@]}"; do
    dpkg-query -W -f '${Status}' "$name" 2>/dev/null | grep -q '^install ok installed$' || missing+=("$name")
  done
  [ ${#missing[@]} -eq 0 ] && return
  [ "$(id -u)" -eq 0 ] || as_root=(sudo)
  say "installing ${missing[*]}"
  "${as_root[@]}" apt-get update -qq || say "package lists could not be refreshed, going on with the old ones"
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
    fail "these packages could not be installed: ${missing[*]}"
}

# The wheel's compiled parts are this machine's, so the guest has to have the same Python.
guest_suite() {
  case $("$PY" -c 'import sys; print("%d.%d" % sys.version_info[:2])') in
    3.11) echo bookworm ;;
    3.13) echo trixie ;;
    *) fail "no Debian release has the Python of .venv; make it with 3.11 or 3.13 (PYTHON=... make setup)" ;;
  esac
}

# Guest packages, with those that are only unpacked left as files in /debs.
make_root() {
  local suite=$1 esys
  esys=libtss2-esys-3.0.2-0
  [ "$suite" = bookworm ] || esys=libtss2-esys-3.0.2-0t64
  say "making a Debian $suite root (about a minute)"
  # Only what this hook names reaches the image; apt's own settings stay outside.
  mmdebstrap --quiet --variant=minbase --include="$GUEST,$esys,libtss2-rc0*,libtss2-fapi1*" \
    --customize-hook="chroot \"\$1\" sh -ec 'mkdir /debs; cd /debs; for p in ${UNPACKED[*]}; do
        apt-get download -q \$p; done; apt-get download -q \$(apt-cache depends linux-image-cloud-amd64 |
        sed -n \"s/.*Depends: //p\" | head -n 1)' >/dev/null 2>&1" \
    "$suite" "$OUT/root.tar" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"}
}

install_project() {
  say "installing the project into it"
  rm -rf "$OUT/guest/opt/spire-hw"
  "$PY" -m pip install -q --disable-pip-version-check --no-compile --target "$OUT/guest/opt/spire-hw" .
  # Files of templates and of other Python versions among the dependencies do not compile.
  "$PY" -m compileall -qq "$OUT/guest/opt/spire-hw" -s "$OUT/guest" || :
}

make_initrd() {
  local ir=$OUT/initrd
  rm -rf "$ir"
  mkdir -p "$ir"/{bin,proc,sys,dev,root,mod}
  cp "$OUT/unpacked/bin/busybox" "$ir/bin/"
  "$PY" scripts/vm_modules.py "$OUT/unpacked" "$ir/mod" virtio_pci virtio_blk virtio_net
  cp scripts/vm-init.sh "$ir/init"
  chmod 755 "$ir/init"
  (cd "$ir" && find . | cpio -o -H newc 2>/dev/null | gzip -1) > "$OUT/initrd.gz"
}

main() {
  local wanted suite deb
  suite=$(guest_suite)
  wanted=$({ cat scripts/vm* pyproject.toml
    git ls-files -z spire_hw plugins server agent | grep -zE '\.(py|mako)$' | xargs -0 cat; } | sha256sum)
  if [ -f "$OUT/made" ] && [ "$(cat "$OUT/made")" = "$wanted" ]; then return; fi
  rm -f "$OUT/made"
  install_tools
  mkdir -p "$OUT"
  if [ ! -f "$OUT/unpacked/suite" ] || [ "$(cat "$OUT/unpacked/suite")" != "$suite" ]; then
    rm -rf "$OUT/guest" "$OUT/unpacked"
    make_root "$suite"
    mkdir -p "$OUT/guest" "$OUT/unpacked"
    tar xf "$OUT/root.tar" -C "$OUT/guest" --no-same-owner --exclude='./dev/*'
    rm "$OUT/root.tar"
    for deb in "$OUT"/guest/debs/*.deb; do dpkg-deb -x "$deb" "$OUT/unpacked"; done
    rm -rf "$OUT/guest/debs"
    echo "$suite" > "$OUT/unpacked/suite"
  fi
  install_project
  cp scripts/vm-guest.sh "$OUT/guest/sbin/guest-init"
  cp "$OUT/unpacked/bin/busybox" "$OUT/guest/bin/busybox"
  chmod 755 "$OUT/guest/sbin/guest-init"
  mkdir -p "$OUT"/guest/{mnt,proc,sys,dev,run,tmp}
  make_initrd
  rm -f "$OUT/root.img"
  mke2fs -q -t ext4 -m 0 -d "$OUT/guest" "$OUT/root.img" 1G
  cp "$OUT"/unpacked/boot/vmlinuz-* "$OUT/vmlinuz"
  cp "$OUT/unpacked/usr/lib/shim/shimx64.efi.signed" "$OUT/shim.efi"
  cp "$OUT/unpacked/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed" "$OUT/grub.efi"
  cp "$OUT"/unpacked/usr/share/OVMF/OVMF_{CODE_4M.secboot,VARS_4M,VARS_4M.ms}.fd "$OUT/"
  printf '%s' "$wanted" > "$OUT/made"
  say "image made: $(du -h "$OUT/root.img" | cut -f1)"
}

main
