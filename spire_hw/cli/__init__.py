"""What the commands of both programs share."""
