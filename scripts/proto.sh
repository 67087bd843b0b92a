#!/usr/bin/env bash
# Generates spire_hw/_pb from proto/. `--check` changes nothing and fails when they differ.
# The generator is older than the libraries we run on, so that its output works with all of them.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly GENERATOR=grpcio-tools==1.80.0
readonly ENV=build/proto-venv

if [ ! -x "$ENV/bin/python" ] || [ "$(cat "$ENV/.generator" 2>/dev/null)" != "$GENERATOR" ]; then
  .venv/bin/python -m venv --clear "$ENV"
  if ! PIP_RETRIES=${PIP_RETRIES:-1} "$ENV/bin/python" -m pip install -q --disable-pip-version-check \
    "$GENERATOR" "setuptools<81" 2>/dev/null; then
    rm -rf "$ENV"
    echo "proto: $GENERATOR cannot be installed (no network?)" >&2
    [ "${1:-}" = --check ] && { echo "proto: check skipped"; exit 0; }
    exit 1
  fi
  printf '%s' "$GENERATOR" > "$ENV/.generator"
fi

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
(cd proto && "../$ENV/bin/python" -m grpc_tools.protoc -I . --python_out="$out" --pyi_out="$out" spire_hw/_pb/*.proto)
touch "$out/spire_hw/_pb/__init__.py"

if [ "${1:-}" = --check ]; then
  diff -r --exclude=__pycache__ "$out/spire_hw/_pb" spire_hw/_pb ||
    { echo "proto: spire_hw/_pb is not what proto/ says; run 'make proto'" >&2; exit 1; }
  echo "proto: generated code is up to date"
else
  find spire_hw/_pb -name '*_pb2.py*' -delete
  cp "$out"/spire_hw/_pb/* spire_hw/_pb/
fi
