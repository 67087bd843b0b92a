"""The other RPC engine: grpcio, behind private sockets, for when ours is in doubt."""

import os

# grpcio writes to stderr by itself, past our log: only what it cannot say otherwise.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
