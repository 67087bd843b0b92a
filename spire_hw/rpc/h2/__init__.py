"""An RPC engine of our own: gRPC over HTTP/2 on asyncio, straight on the sockets of the transport."""
