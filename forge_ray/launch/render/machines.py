"""Which machine of a cloud holds which GPUs, and what Ray may hand out of it.

Sizes are the clouds' published ones. Ray's autoscaler starts nodes from nothing by these numbers,
so a node type must say what it will offer before the first one exists.
"""

from __future__ import annotations

from dataclasses import dataclass

from forge_ray.errors import ConfigError

_GIB = 2**30
_RAY_SHARE = 0.65
"""Share of a machine's memory that tasks may ask for; the object store takes 30 %, the system the
rest."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine type of a cloud."""

    name: str
    """The cloud's name for it."""
    cpus: int
    """Virtual CPUs."""
    memory_gib: int
    """Main memory."""
    gpus: int = 0
    """GPUs."""

    @property
    def ray_memory(self) -> int:
        """Bytes that tasks may ask for."""
        return int(self.memory_gib * _RAY_SHARE) * _GIB


GpuMachines = dict[tuple[str, int], Machine]
CpuMachines = dict[int, Machine]


def _rows(gpu: str, *rows: tuple[int, str, int, int]) -> GpuMachines:
    return {
        (gpu, gpus): Machine(name=name, cpus=cpus, memory_gib=memory, gpus=gpus)
        for gpus, name, cpus, memory in rows
    }


AWS_GPU = {
    **_rows("T4", (1, "g4dn.2xlarge", 8, 32), (4, "g4dn.12xlarge", 48, 192)),
    **_rows(
        "L4", (1, "g6.2xlarge", 8, 32), (4, "g6.12xlarge", 48, 192), (8, "g6.48xlarge", 192, 768)
    ),
    **_rows(
        "A10G", (1, "g5.2xlarge", 8, 32), (4, "g5.12xlarge", 48, 192), (8, "g5.48xlarge", 192, 768)
    ),
    **_rows(
        "L40S",
        (1, "g6e.2xlarge", 8, 64),
        (4, "g6e.12xlarge", 48, 384),
        (8, "g6e.48xlarge", 192, 1536),
    ),
    **_rows("A100", (8, "p4d.24xlarge", 96, 1152)),
    **_rows("H100", (8, "p5.48xlarge", 192, 2048)),
    **_rows("H200", (8, "p5en.48xlarge", 192, 2048)),
}
"""Machines of AWS by GPU (Ray's name for it) and how many."""

GCP_GPU = {
    **_rows(
        "L4",
        (1, "g2-standard-8", 8, 32),
        (2, "g2-standard-24", 24, 96),
        (4, "g2-standard-48", 48, 192),
        (8, "g2-standard-96", 96, 384),
    ),
    **_rows(
        "A100",
        (1, "a2-highgpu-1g", 12, 85),
        (2, "a2-highgpu-2g", 24, 170),
        (4, "a2-highgpu-4g", 48, 340),
        (8, "a2-highgpu-8g", 96, 680),
    ),
    **_rows("H100", (1, "a3-highgpu-1g", 26, 234), (8, "a3-highgpu-8g", 208, 1872)),
}
"""Machines of GCP by GPU and how many."""

AWS_CPU = {
    4: Machine(name="m7i.xlarge", cpus=4, memory_gib=16),
    8: Machine(name="m7i.2xlarge", cpus=8, memory_gib=32),
    16: Machine(name="m7i.4xlarge", cpus=16, memory_gib=64),
    32: Machine(name="m7i.8xlarge", cpus=32, memory_gib=128),
}
"""Machines of AWS without GPU by CPUs."""

GCP_CPU = {
    cpus: Machine(name=f"n2-standard-{cpus}", cpus=cpus, memory_gib=4 * cpus)
    for cpus in (4, 8, 16, 32)
}
"""Machines of GCP without GPU by CPUs."""

KNOWN_GPUS = sorted({gpu for gpu, _ in (*AWS_GPU, *GCP_GPU)})
"""Names that Ray gives the GPUs above."""


def gpu_machine(table: GpuMachines, gpu: str, gpus: int) -> Machine:
    """The machine with that many of that GPU.

    Raises:
        ConfigError: The cloud has none; names what it has.
    """
    if (gpu, gpus) not in table:
        known = ", ".join(f"{count} x {name}" for name, count in sorted(table))
        raise ConfigError(
            f"gpu and gpus_per_node must be a machine that this cloud rents, got {gpus} x {gpu}. "
            f"Choose from: {known}."
        )
    return table[gpu, gpus]
