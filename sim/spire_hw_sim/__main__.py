"""`python -m spire_hw_sim`: the simulators by hand."""

from spire_hw_sim.cli import main

if __name__ == "__main__":
    main()
