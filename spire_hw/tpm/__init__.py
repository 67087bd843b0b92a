"""TPM 2.0: the verifier in pure Python, the device over tpm2-tss."""
