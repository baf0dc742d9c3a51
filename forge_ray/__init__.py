"""forge-ray: semantic IDs, generative retrieval and pruned sweeps over both, on Ray."""

__version__ = "0.1.0"
