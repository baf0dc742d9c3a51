"""The smallest sweep that runs everything: data, tokenizers, gate, trainings, evaluation."""

from __future__ import annotations

import yaml

SWEEP = """
name: tiny
synthetic: {num_items: 300, num_users: 400, vector_dim: 16, branching: [4, 4], users_per_shard: 100}
space:
  sid.quantizer.codebook_size: {choice: [32, 64]}
points:
- {sid.quantizer.kind: random}
sampler: {kind: grid}
num_trials: null
max_concurrent: 1
sid: {quantizer: {levels: 2}}
gr:
  model: {hidden_size: 32, num_layers: 1, num_heads: 2, intermediate_size: 64}
  engine: {global_batch: 32}
  max_steps: 60
  max_history: 10
  cpus_per_worker: 0.5
  max_failures: 1
  validation: {every: 20, users: 50, ks: [5, 10]}
evaluation: {users: 100}
gate: {warmup: 10}
asha: {enabled: false}
"""


def with_sections(changes: str) -> str:
    """The sweep file with top-level sections replaced, or added."""
    return str(yaml.safe_dump({**yaml.safe_load(SWEEP), **yaml.safe_load(changes)}))
