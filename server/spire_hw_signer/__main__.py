"""`python -m spire_hw_signer`: the same as the program `spire-hw-signer`."""

from spire_hw_signer.cli.main import main

if __name__ == "__main__":
    main()
