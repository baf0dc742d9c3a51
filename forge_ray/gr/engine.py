"""DeepSpeed behind one small class: the only module that imports it.

The global batch is constant: a worker's share shrinks as workers are added, and gradients are
scaled by the target tokens of the *whole* global batch, so the update does not depend on how rows
were spread over workers and micro-batches. The learning rate is a function of the step alone and
random draws are seeded by step and rank, so a checkpoint needs no generator state to resume
exactly.

Knows generators and token batches. Knows nothing about Ray, files of sequences or items.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import shutil
import tempfile
import warnings
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, distributed

from forge_ray.errors import ArtifactError, ConfigError
from forge_ray.gr.compiling import compile_blocks
from forge_ray.gr.models.base import Generator, TokenBatch

T = TypeVar("T")

TAG = "engine"
"""Folder of DeepSpeed's files inside a checkpoint."""
_TENSORS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@dataclass(kw_only=True)
class EngineConfig:
    """Optimiser, precision and sharding."""

    zero_stage: int = 1
    """What ZeRO shards over workers: 0 nothing, 1 optimiser state, 2 + gradients, 3 + weights."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 pays on GPUs; on CPUs a small model was measured slower than in fp32."""
    global_batch: int = 64
    """Rows of one optimiser step over all workers, constant at any world size."""
    micro_batch: int = 0
    """Rows per worker and forward pass; the rest accumulates. 0 takes the whole share at once."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    warmup_steps: int = 50
    """Steps of linear warm-up from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up; the last two end at 0."""
    weight_decay: float = 0.01
    """Decoupled weight decay of AdamW."""
    beta2: float = 0.99
    """AdamW's decay of squared gradients; short runs profit from less than 0.999."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    activation_checkpointing: bool = False
    """Whether transformer blocks compute their activations again in the backward pass instead of
    keeping them: less memory for one more forward pass. The loss is the same."""
    compile: bool = False
    """Whether transformer blocks run as code that torch.compile makes of them, at the cost of some
    time at the start and of a compiler on every node. The loss is the same to float tolerance."""

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if not 0 <= self.zero_stage <= 3:
            raise ConfigError(f"engine.zero_stage must be 0..3, got {self.zero_stage}. Use e.g. 1.")
        if self.global_batch < 1:
            raise ConfigError(
                f"engine.global_batch must be >= 1, got {self.global_batch}. Use e.g. 64."
            )
        if self.micro_batch < 0:
            raise ConfigError(
                f"engine.micro_batch must be >= 0, got {self.micro_batch}. Use 0 for one pass."
            )
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise ConfigError(f"engine.{name} must be >= 0, got {getattr(self, name)}. Use 0.")
        if not 0 <= self.beta2 < 1:
            raise ConfigError(f"engine.beta2 must be in [0, 1), got {self.beta2}. Use e.g. 0.99.")
        if self.learning_rate <= 0:
            raise ConfigError(
                f"engine.learning_rate must be > 0, got {self.learning_rate}. Use e.g. 1e-3."
            )
        if self.compile and self.activation_checkpointing:
            raise ConfigError(
                "engine.compile must be false with engine.activation_checkpointing=true, got true: "
                "what a compiled block keeps cannot be computed again. Choose one of the two."
            )

    def accumulation(self, world_size: int) -> int:
        """Forward passes of one worker per optimiser step.

        The global batch need not divide evenly: gradients are scaled by the targets of all rows,
        so shares may differ by a row.
        """
        share = -(-self.global_batch // world_size)
        return -(-share // self.micro_batch) if self.micro_batch else 1

    def learning_rate_at(self, step: int, max_steps: int) -> float:
        """Learning rate of the update that ends step `step`, counted from 1."""
        if step <= self.warmup_steps:
            return self.learning_rate * step / max(1, self.warmup_steps)
        done = (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)
        if self.schedule == "linear":
            return self.learning_rate * max(0.0, 1.0 - done)
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        return self.learning_rate


def zero_config(config: EngineConfig, *, world_size: int, num_parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration of one run.

    Args:
        config: ours.
        world_size: number of workers.
        num_parameters: of the model; bounds the communication buffers, whose default is 2 GB.
    """
    accumulation = config.accumulation(world_size)
    # DeepSpeed only multiplies the two; rows of a pass are what the stream gives.
    rows = max(1, config.global_batch // (world_size * accumulation))
    bucket = max(1_000_000, min(num_parameters, 500_000_000))
    return {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.clip_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_live_parameters": 10 * bucket,
            "stage3_param_persistence_threshold": 1_000,
        },
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class Engine:
    """A generator under training, sharded over the workers of the current process group."""

    config: EngineConfig
    world_size: int
    rank: int
    device: torch.device
    module: Generator

    def __init__(
        self,
        generator: Generator,
        config: EngineConfig,
        *,
        max_steps: int,
        seed: int,
        use_gpu: bool = False,
    ) -> None:
        """Wraps a generator; every worker of the process group does so with the same arguments.

        Args:
            generator: on the CPU.
            config: of the engine.
            max_steps: length of the learning rate's schedule.
            seed: of dropout.
            use_gpu: trains on this process's current GPU; otherwise on the CPU, whatever GPUs the
                process sees.
        """
        deepspeed = _import_deepspeed()
        _place_deepspeed(deepspeed, use_gpu=use_gpu)
        self.config = config
        self.world_size = distributed.get_world_size()
        self.rank = distributed.get_rank()
        self.module = generator
        if config.activation_checkpointing:
            generator.recompute_activations()
        self._max_steps = max_steps
        self._seed = seed
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")
        )
        if config.compile:
            blocks = generator.compilable()
            compile_blocks(blocks, self.device)
            if config.zero_stage == 3:
                # The weights of a whole block are fetched around it, not inside its code.
                deepspeed.utils.set_z3_leaf_modules(generator, list({type(one) for one in blocks}))
        optimizer = torch.optim.AdamW(
            generator.parameters(),
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        size = sum(parameter.numel() for parameter in generator.parameters())
        self._engine, *_ = deepspeed.initialize(
            model=generator,
            optimizer=optimizer,
            config=zero_config(config, world_size=self.world_size, num_parameters=size),
            dist_init_required=False,
        )
        _forget_trial_step(self._engine.optimizer)

    def close(self) -> None:
        """Lets the generator and its optimiser go; no step can follow.

        DeepSpeed holds them otherwise for as long as the process lives; at ZeRO 3 it still does.
        """
        self._engine.destroy()

    @property
    def accumulation(self) -> int:
        """Forward passes of this worker per step."""
        return self.config.accumulation(self.world_size)

    def step(self, micro_batches: Sequence[TokenBatch], *, num_targets: int, step: int) -> Tensor:
        """One optimiser step.

        Args:
            micro_batches: this worker's share, exactly `accumulation` parts (empty ones allowed).
            num_targets: target tokens of the global batch, over all workers.
            step: number of this step, from 1.

        Returns:
            Loss of this worker's share, detached; summed over workers it is the mean per token.
        """
        # Dropout is a function of (seed, step, rank): a resumed run draws what it would have drawn.
        torch.manual_seed((self._seed * 1_000_003 + step) * 4_096 + self.rank)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(step, self._max_steps)
        self._engine.train()
        total = torch.zeros((), device=self.device)
        for batch in micro_batches:
            loss = self._engine(batch.to(self.device)) / num_targets
            # DeepSpeed averages gradients over workers; the sum of shares is what is meant.
            self._engine.backward(loss * self.world_size, scale_wrt_gas=False)
            self._engine.step()
            total += loss.detach()
        return total

    def sum_over_workers(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over all workers; every worker calls it equally often."""
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor)
        return [float(value) for value in tensor]

    def barrier(self) -> None:
        """Waits for all workers."""
        distributed.barrier()

    def from_first(self, value: T) -> T:
        """Rank 0's value, on every worker; small and picklable."""
        shared: list[Any] = [value]
        distributed.broadcast_object_list(shared, src=0, device=self.device)
        return cast(T, shared[0])

    def full_state(self) -> dict[str, Tensor]:
        """Consolidated float32 weights on rank 0's CPU; every worker calls it, others get none.

        Spread weights are brought together one parameter at a time, so that no device holds more
        than the largest of them beside its own share.
        """
        state: dict[str, Tensor] = {}
        for name, value in self.module.state_dict(keep_vars=True).items():
            with self._whole(value):
                if self.rank == 0:
                    # Cloned: under ZeRO it is a view that the next step overwrites or frees.
                    state[name] = value.detach().float().cpu().clone()
        return state

    def _whole(self, value: Tensor) -> contextlib.AbstractContextManager[None]:
        """Brings a weight together that is spread over the workers, for the length of a block."""
        if self.config.zero_stage < 3:
            return contextlib.nullcontext()
        gathered: contextlib.AbstractContextManager[None] = (
            _import_deepspeed().zero.GatheredParameters([value])
        )
        return gathered

    def save(self, folder: Path) -> None:
        """Writes this worker's shard; every worker calls it."""
        folder.mkdir(parents=True, exist_ok=True)
        self._engine.save_checkpoint(str(folder), tag=TAG)

    def load(self, folder: Path, *, world_size: int) -> None:
        """Restores weights and optimiser; every worker calls it.

        Args:
            folder: holds all workers' shards.
            world_size: workers that wrote them; any other number than now goes through DeepSpeed's
                universal checkpoint.

        Raises:
            ArtifactError: The folder holds no shards, or shards that hold more than tensors and
                numbers.
        """
        if not any((folder / TAG).glob("*.pt")):
            raise ArtifactError(
                f"{folder}/{TAG} must hold a DeepSpeed checkpoint, got none. Remove the run's "
                "folder and train again."
            )
        try:
            with _tensors_only():
                self._load(folder, world_size)
        except pickle.UnpicklingError as error:
            raise ArtifactError(
                f"{folder}/{TAG} must hold tensors and numbers only, got: {str(error).strip()}. "
                "Whoever wrote it may want to run code here: remove the run's folder and train "
                "again."
            ) from error

    def _load(self, folder: Path, world_size: int) -> None:
        # Without sharding the whole state is in one file, in bf16 too.
        if self.config.zero_stage == 0 or world_size == self.world_size:
            self._engine.load_checkpoint(str(folder), tag=TAG)
            return
        with self._universal(folder / TAG) as converted:
            settings = self._engine._config  # private: the setting is read at start-up only
            settings.load_universal_checkpoint = True
            try:
                self._engine.load_checkpoint(str(converted), tag=TAG)
            finally:
                settings.load_universal_checkpoint = False

    @contextlib.contextmanager
    def _universal(self, shards: Path) -> Iterator[Path]:
        """A folder with the shards as a universal checkpoint, one on every node."""
        name = tempfile.mkdtemp(prefix="forge-ray-universal-") if self.rank == 0 else ""
        folder = Path(self.from_first(name))
        is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"
        try:
            if is_first_here:
                _convert(shards, folder / TAG)
            self.barrier()
            yield folder
            self.barrier()  # not after a failure, which the others need not share
        finally:
            if is_first_here:
                shutil.rmtree(folder, ignore_errors=True)


def expected_shards(zero_stage: int, world_size: int, precision: str) -> list[str]:
    """Files that the workers of a run write into `engine/`, for the checkpoint's manifest."""
    if zero_stage == 0:
        return ["mp_rank_00_model_states.pt"]
    prefix = "bf16_" if precision == "bf16" else ""
    ranks = range(world_size)
    optimizers = [f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in ranks]
    if zero_stage < 3:
        return ["mp_rank_00_model_states.pt", *optimizers]
    return [*(f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in ranks), *optimizers]


def _convert(shards: Path, target: Path) -> None:
    """Turns the shards of all workers into one file per parameter, quietly."""
    _import_deepspeed()
    from deepspeed.checkpoint import ds_to_universal

    options = Namespace(
        input_folder=str(shards),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    # It prints its steps and draws bars.
    with (
        open(os.devnull, "w", encoding="utf-8") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(nothing),
    ):
        ds_to_universal.main(options)


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Lets torch unpickle tensors, numbers and DeepSpeed's own plain classes alone.

    DeepSpeed asks for whole pickles, which may run any code; torch's variable overrides that.
    """
    _import_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(_TENSORS_ONLY)
    os.environ[_TENSORS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[_TENSORS_ONLY]
        else:
            os.environ[_TENSORS_ONLY] = before


def _forget_trial_step(optimizer: Any) -> None:
    """Undoes the step that DeepSpeed's half-precision optimiser without ZeRO takes to make room.

    It has zero gradients, but Adam counts it, and weight decay shrinks the master weights.
    """
    if type(optimizer).__name__ != "FP16_UnfusedOptimizer":
        return
    optimizer.optimizer.state.clear()
    for masters, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
        for master, weight in zip(masters, weights, strict=True):
            master.data.copy_(weight.data)


def _import_deepspeed() -> Any:
    """DeepSpeed, quiet, and without compiling anything on machines without a GPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Its import runs before anyone can set the level, and it warns about absent compilers.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch has renamed; nothing a user can change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed


def _place_deepspeed(deepspeed: Any, *, use_gpu: bool) -> None:
    """Tells DeepSpeed where to work: by itself it takes a GPU wherever there is one."""
    from deepspeed.accelerator import cpu_accelerator, cuda_accelerator

    if deepspeed.accelerator.get_accelerator().device_name() != ("cuda" if use_gpu else "cpu"):
        deepspeed.accelerator.set_accelerator(
            cuda_accelerator.CUDA_Accelerator() if use_gpu else cpu_accelerator.CPU_Accelerator()
        )
    if not use_gpu:
        # The first CPU start would compile this op for minutes, and use it only where LOCAL_SIZE
        # is set, which Ray does not do. Private name: DeepSpeed fills it lazily, by probing
        # compilers; a filled one is left as it is.
        vars(deepspeed.ops).setdefault("__compatible_ops__", defaultdict(bool))
