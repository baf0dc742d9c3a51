"""Which trackers a sweep file asks for; passwords and keys are none of its business."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from urllib.parse import urlsplit

from forge_ray.errors import ConfigError

_MODES = ("offline", "online")


@dataclass(kw_only=True)
class MlflowConfig:
    """One MLflow run per trial."""

    tracking_uri: str = ""
    """Server or database; empty takes MLFLOW_TRACKING_URI, else `mlflow.db` (SQLite) in the sweep's
    folder. User and password belong in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    experiment: str = ""
    """Experiment; empty takes the sweep's name."""

    def __post_init__(self) -> None:
        if urlsplit(self.tracking_uri).password:
            raise ConfigError(
                "trackers.mlflow.tracking_uri must hold no password, got one: sweep files and "
                "reports are shown to others. Set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or the whole of it as MLFLOW_TRACKING_URI."
            )


@dataclass(kw_only=True)
class TensorboardConfig:
    """One folder of event files per trial."""

    folder: str = ""
    """Where; empty takes `tensorboard` in the sweep's folder."""


@dataclass(kw_only=True)
class WandbConfig:
    """One Weights & Biases run per trial. The key comes from WANDB_API_KEY or `wandb login`."""

    project: str = ""
    """Project; empty takes the sweep's name."""
    mode: str = "offline"
    """`offline` writes to `wandb` in the sweep's folder, for `wandb sync`; `online` sends."""

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ConfigError(
                f"trackers.wandb.mode must be one of {', '.join(_MODES)}, got {self.mode!r}. "
                "Leave wandb out to track nothing there."
            )


@dataclass(kw_only=True)
class TrackersConfig:
    """Trackers of a sweep; those left out are off. `{}` switches one on with its defaults."""

    mlflow: MlflowConfig | None = None
    """MLflow."""
    tensorboard: TensorboardConfig | None = None
    """TensorBoard."""
    wandb: WandbConfig | None = None
    """Weights & Biases."""


_LIBRARIES = {"mlflow": "mlflow", "tensorboard": "tensorboardX", "wandb": "wandb"}


def check_libraries(config: TrackersConfig) -> None:
    """Refuses a tracker whose library is not installed.

    Raises:
        ConfigError: See above.
    """
    for name, library in _LIBRARIES.items():
        if getattr(config, name) is not None and importlib.util.find_spec(library) is None:
            raise ConfigError(
                f"trackers.{name} must have its library, got no {library} here. "
                f"Run: pip install 'forge-ray[{name}]'."
            )
