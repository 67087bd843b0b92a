#!/usr/bin/env bash
# Provisions the server's machine: a SoftHSM token for the CA keys, server.conf, the systemd unit.
# Run as root in /opt/spire-hw after `make setup`; running it again changes nothing that is there.
#
#   vagrant-server.sh TRUST_DOMAIN
set -euo pipefail
readonly TRUST_DOMAIN=${1:?usage: vagrant-server.sh TRUST_DOMAIN}
readonly HOME_DIR=/opt/spire-hw ETC=/etc/spire-hw LABEL=spire-ca USER_NAME=spire-server
readonly SOCKET=/run/spire-hw/server/private/api.sock

id "$USER_NAME" >/dev/null 2>&1 ||
  useradd --system --home-dir /var/lib/spire-hw --no-create-home --shell /usr/sbin/nologin "$USER_NAME"
usermod --append --groups softhsm "$USER_NAME"
install -d -m 0755 "$ETC"

if [ ! -s "$ETC/pin" ]; then
  (umask 077; openssl rand -hex 16 > "$ETC/pin")
  chown "$USER_NAME" "$ETC/pin"
fi
if ! runuser -u "$USER_NAME" -- softhsm2-util --show-slots | grep -q "^ *Label: *$LABEL *$"; then
  # The security officer's PIN is thrown away: nobody resets this token's PIN.
  runuser -u "$USER_NAME" -- softhsm2-util --init-token --free --label "$LABEL" \
    --pin "$(cat "$ETC/pin")" --so-pin "$(openssl rand -hex 16)" >/dev/null
fi
if [ ! -e "$ETC/server.conf" ]; then
  sed -e "s|\"example.org\"|\"$TRUST_DOMAIN\"|" "$HOME_DIR/server/server.conf" > "$ETC/server.conf"
fi

install -m 0644 "$HOME_DIR/packaging/systemd/spire-hw-server.service" /etc/systemd/system/
echo "export SPIRE_HW_SOCKET_PATH=$SOCKET" > /etc/profile.d/spire-hw.sh
systemctl daemon-reload
systemctl enable --now spire-hw-server.service
for _ in $(seq 60); do
  if spire-hw-server healthcheck -socketPath "$SOCKET" >/dev/null 2>&1; then
    echo "spire-hw-server is up. Enrol the nodes from the host: scripts/vagrant-enrol.sh"
    exit 0
  fi
  sleep 1
done
journalctl --no-pager -n 30 -u spire-hw-server.service >&2 || true
echo "vagrant-server: the server is not healthy after a minute" >&2
exit 1
