"""What a trust domain's verifiers trust, and how it travels."""
