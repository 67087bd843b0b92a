"""What machine an agent runs on."""
