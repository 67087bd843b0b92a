"""`python -m spire_hw_agent`: the same as the program `spire-hw-agent`."""

from spire_hw_agent.cli.main import main

if __name__ == "__main__":
    main()
