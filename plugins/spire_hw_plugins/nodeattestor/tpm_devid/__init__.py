"""NodeAttestor `tpm_devid`: a certificate for a key in the TPM, and proof that both are there."""
