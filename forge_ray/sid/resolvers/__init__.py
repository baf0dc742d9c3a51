"""What to do with items that share a semantic ID; pure functions of a frozen code table."""
