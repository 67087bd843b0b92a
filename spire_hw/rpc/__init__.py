"""RPC: one seam between services and the engine that serves them."""

import os

# grpcio writes to stderr by itself, past our log: only what it cannot say otherwise.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
