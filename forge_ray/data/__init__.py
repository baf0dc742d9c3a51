"""Datasets: import, synthesise, prepare, read and stream interaction logs and item vectors."""
