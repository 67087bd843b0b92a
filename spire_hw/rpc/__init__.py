"""RPC: one seam between services and the engine that serves them."""
