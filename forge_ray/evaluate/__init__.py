"""Item-level ranking metrics and the baselines that every table carries."""
