#!/usr/bin/env bash
# Introduces the machines of the Vagrantfile to each other, from the host: each node gets the
# server's bundle, the server the hash of each node's endorsement key. Then the agents are started.
set -euo pipefail
cd "$(dirname "$0")/.."

on() { local machine=$1; shift; vagrant ssh "$machine" --no-tty -c "$*" -- -q; }
readonly SERVER_SOCKET=/run/spire-hw/server/private/api.sock

bundle=$(on server "sudo spire-hw-server bundle show -socketPath $SERVER_SOCKET")
for node in $(vagrant status --machine-readable | awk -F, '$2 ~ /^node/ && $3 == "state" && $4 == "running" {print $2}'); do
  on "$node" 'sudo tee /etc/spire-hw/bootstrap.pem >/dev/null' <<< "$bundle"
  hash=$(on "$node" 'sudo spire-hw-agent tpm ek-hash' | tr -d '\r')
  on server "sudo spire-hw-server tpm allow $hash -comment $node -socketPath $SERVER_SOCKET"
  on "$node" 'sudo systemctl restart spire-hw-agent.service'
done
on server "sudo spire-hw-server agent list -socketPath $SERVER_SOCKET"
