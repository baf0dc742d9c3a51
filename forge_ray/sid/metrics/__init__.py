"""What a SID table is worth, measured without training a generator."""
