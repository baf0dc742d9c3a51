"""Generative retrieval over SIDs: training, constrained decoding, recommending."""
