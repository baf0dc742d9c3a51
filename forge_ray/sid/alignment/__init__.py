"""Losses that align quantized items with behaviour."""
