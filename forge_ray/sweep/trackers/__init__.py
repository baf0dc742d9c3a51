"""Trackers that a sweep writes to beside its ledger: MLflow, TensorBoard, Weights & Biases."""
