"""`python -m spire_hw_server`: the same as the program `spire-hw-server`."""

from spire_hw_server.cli.main import main

if __name__ == "__main__":
    main()
