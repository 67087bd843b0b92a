#!/usr/bin/env bash
# Provisions a node's machine: agent.conf and the systemd unit; the TPM is the machine's own.
# Run as root in /opt/spire-hw after `make setup`; running it again changes nothing that is there.
#
#   vagrant-node.sh TRUST_DOMAIN SERVER_ADDRESS
set -euo pipefail
readonly TRUST_DOMAIN=${1:?usage: vagrant-node.sh TRUST_DOMAIN SERVER_ADDRESS}
readonly SERVER=${2:?usage: vagrant-node.sh TRUST_DOMAIN SERVER_ADDRESS}
readonly HOME_DIR=/opt/spire-hw ETC=/etc/spire-hw
readonly SOCKET=/run/spire-hw/agent/public/api.sock

install -d -m 0755 "$ETC"
if [ ! -e "$ETC/agent.conf" ]; then
  sed -e "s|\"example.org\"|\"$TRUST_DOMAIN\"|" -e "s|\"spire-server.example.org\"|\"$SERVER\"|" \
    "$HOME_DIR/agent/agent.conf" > "$ETC/agent.conf"
fi
install -m 0644 "$HOME_DIR/packaging/systemd/spire-hw-agent.service" /etc/systemd/system/
cat > /etc/profile.d/spire-hw.sh <<PROFILE
export SPIRE_HW_SOCKET_PATH=$SOCKET
export SPIFFE_ENDPOINT_SOCKET=unix://$SOCKET
PROFILE
systemctl daemon-reload
systemctl enable spire-hw-agent.service
if [ -s "$ETC/bootstrap.pem" ]; then
  systemctl restart spire-hw-agent.service
fi
echo "$(hostname): EK hash $(spire-hw-agent tpm ek-hash)"
