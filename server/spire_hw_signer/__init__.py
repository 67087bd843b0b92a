"""The off-host signer: holds a server's CA keys beside the HSM, signs within a policy, logs it all."""
