"""Pruned sweeps over SID designs: space, search, gate, trials, ledger, report."""
