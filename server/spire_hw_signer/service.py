"""The signer's service: check against policy, write it down, sign, write down what became of it."""
