"""What operators may do on the signer's own host, over a unix socket."""
