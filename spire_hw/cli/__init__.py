"""What our command line programs share: Go's flag syntax, output, exit codes."""
