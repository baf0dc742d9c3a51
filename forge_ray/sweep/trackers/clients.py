"""The trackers themselves, each over its own library, which is imported when first written to."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, cast

from forge_ray.sweep.ledger import TrialRecord
from forge_ray.sweep.trackers.config import (
    MlflowConfig,
    TensorboardConfig,
    TrackersConfig,
    WandbConfig,
)
from forge_ray.sweep.trackers.feed import Tracker
from forge_ray.sweep.trackers.news import News, figures, labels

_MLFLOW_STATUS = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}


def make_trackers(config: TrackersConfig, *, sweep: str, folder: Path) -> list[Tracker]:
    """The trackers that a sweep file asks for."""
    trackers: list[Tracker] = []
    if config.mlflow is not None:
        trackers.append(MlflowTracker(config.mlflow, sweep=sweep, folder=folder))
    if config.tensorboard is not None:
        trackers.append(TensorboardTracker(config.tensorboard, folder=folder))
    if config.wandb is not None:
        trackers.append(WandbTracker(config.wandb, sweep=sweep, folder=folder))
    return trackers


class MlflowTracker:
    """One MLflow run per trial, found again by the tag `trial_key`."""

    name = "mlflow"

    def __init__(self, config: MlflowConfig, *, sweep: str, folder: Path) -> None:
        asked = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        self._uri = asked or f"sqlite:///{folder.resolve() / 'mlflow.db'}"
        self._experiment = config.experiment or sweep
        self._sweep = sweep
        self._client: Any = None
        self._experiment_id = ""
        self._sure: set[str] = set()
        """Runs that hold what was sent to them, as no call failed since."""
        # The environment's URI may hold a password, and `place` is shown.
        shown = config.tracking_uri or ("MLFLOW_TRACKING_URI" if asked else self._uri)
        self.place = f"{shown}, experiment {self._experiment}"

    def send(self, news: News) -> str:
        """Writes parameters, figures and tags; begins or continues the trial's run."""
        from mlflow.entities import Metric, Param, RunTag

        self._connect()
        record = news.record
        run = news.run or self._find(record) or self._begin(record)
        scalars = [
            (step, {plain_name(name): value for name, value in row.items()})
            for step, row in news.scalars
        ]
        if run not in self._sure:
            scalars = self._missing(run, scalars)
        self._sure.discard(run)
        at = int(time.time() * 1000)
        for start in range(0, len(scalars), 20):  # a batch holds 1,000 metrics at most
            metrics = [
                Metric(name, value, at, step)
                for step, row in scalars[start : start + 20]
                for name, value in row.items()
            ]
            self._client.log_batch(run, metrics=metrics)
        parameters = [Param(plain_name(name), str(value)) for name, value in record.point.items()]
        tags = [RunTag(plain_name(name), value[:5000]) for name, value in labels(record).items()]
        self._client.log_batch(run, params=parameters, tags=tags)
        if news.is_ended:
            ended = _milliseconds(record.ended)
            self._client.set_terminated(run, _MLFLOW_STATUS[record.state], ended)
        else:
            self._client.update_run(run, status="RUNNING")
        self._sure.add(run)
        return run

    def close(self) -> None:
        """Nothing is open between two calls."""

    def _connect(self) -> None:
        if self._client is not None:
            return
        # MLflow's own retries take minutes; the feed comes back by itself.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient

        # It announces every table that it creates.
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        client = MlflowClient(tracking_uri=self._uri)
        found = client.get_experiment_by_name(self._experiment)
        self._experiment_id = (
            found.experiment_id if found else client.create_experiment(self._experiment)
        )
        self._client = client

    def _missing(
        self, run: str, scalars: list[tuple[int, dict[str, float]]]
    ) -> list[tuple[int, dict[str, float]]]:
        """The figures that a run lacks: MLflow would keep one that is sent again a second time."""
        wanted = {name for _, row in scalars for name in row}
        held = wanted & set(self._client.get_run(run).data.metrics)
        steps = {
            name: {one.step for one in self._client.get_metric_history(run, name)} for name in held
        }
        return [
            (step, {name: row[name] for name in row if step not in steps.get(name, ())})
            for step, row in scalars
        ]

    def _find(self, record: TrialRecord) -> str:
        runs = self._client.search_runs(
            [self._experiment_id],
            filter_string=f"tags.trial_key = '{record.key}' and tags.sweep = '{self._sweep}'",
            max_results=1,
        )
        return str(runs[0].info.run_id) if runs else ""

    def _begin(self, record: TrialRecord) -> str:
        run = self._client.create_run(
            self._experiment_id,
            run_name=record.name,
            start_time=_milliseconds(record.started),
            tags={"trial_key": record.key, "sweep": self._sweep},
        )
        return str(run.info.run_id)


class TensorboardTracker:
    """One folder of event files per trial; a trial that continues adds a file to its folder."""

    name = "tensorboard"

    def __init__(self, config: TensorboardConfig, *, folder: Path) -> None:
        self._folder = Path(config.folder or folder / "tensorboard").resolve()
        self._writers: dict[str, Any] = {}
        self.place = str(self._folder)

    def send(self, news: News) -> str:
        """Writes figures; at the trial's end parameters and words too."""
        record = news.record
        run = news.run or record.name
        writer = self._writer(run)
        for step, row in news.scalars:
            for name, value in row.items():
                writer.add_scalar(plain_name(name), value, global_step=step)
        writer.add_text("trial", _as_table(labels(record)))
        if news.is_ended:
            self._add_parameters(writer, record)
            self._writers.pop(run).close()
        else:
            writer.flush()
        return run

    def close(self) -> None:
        """Closes the files of trials that continue another time."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _writer(self, run: str) -> Any:
        from tensorboardX import SummaryWriter

        if run not in self._writers:
            # Two files of one second would have one name, and the later would replace the earlier.
            suffix = f".{os.getpid()}.{time.time_ns()}"
            self._writers[run] = SummaryWriter(str(self._folder / run), filename_suffix=suffix)
        return self._writers[run]

    def _add_parameters(self, writer: Any, record: TrialRecord) -> None:
        from tensorboardX.summary import hparams

        point = {
            name: value if isinstance(value, (bool, int, float)) else str(value)
            for name, value in record.point.items()
        }
        # Without a figure the table of parameters leaves the trial out.
        measured = figures(record.final, prefix="final/") or figures(
            record.proxies, prefix="proxy/"
        )
        for summary in hparams(hparam_dict=point, metric_dict=measured):
            writer.file_writer.add_summary(summary)


class WandbTracker:
    """One Weights & Biases run per trial, whose id is made of the sweep and the trial's key."""

    name = "wandb"

    def __init__(self, config: WandbConfig, *, sweep: str, folder: Path) -> None:
        self._config = config
        self._sweep = sweep
        self._folder = folder.resolve()
        self._runs: dict[str, Any] = {}
        project = config.project or sweep
        where = self._folder / "wandb" if config.mode == "offline" else "online"
        self._project = re.sub(r"[/\\#?%:]", "-", project)
        self.place = f"{where}, project {self._project}"

    def send(self, news: News) -> str:
        """Logs figures and the words of the summary; ends the run with the trial."""
        record = news.record
        run = news.run or re.sub(r"[^\w-]", "-", f"{self._sweep}-{record.key[:16]}")
        opened = self._open(run, record)
        for step, row in news.scalars:
            opened.log({**row, "global_step": step})
        opened.summary.update(labels(record))
        if news.is_ended:
            del self._runs[run]
            opened.finish(exit_code=1 if record.state == "failed" else 0)
        return run

    def close(self) -> None:
        """Ends the process's runs; those of unfinished trials continue under their id."""
        for opened in self._runs.values():
            opened.finish()
        self._runs.clear()

    def _open(self, run: str, record: TrialRecord) -> Any:
        if run in self._runs:
            return self._runs[run]
        import wandb

        self._folder.mkdir(parents=True, exist_ok=True)
        opened = wandb.init(
            project=self._project,
            id=run,
            name=record.name,
            group=self._sweep,
            config={**record.point, "trial_key": record.key},
            dir=str(self._folder),
            mode=cast("Literal['offline', 'online']", self._config.mode),
            # Offline there is nobody to ask; `wandb sync --append` joins the parts by their id.
            resume="allow" if self._config.mode == "online" else None,
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                save_code=False,
                x_disable_stats=True,
            ),
        )
        opened.define_metric("global_step")
        opened.define_metric("*", step_metric="global_step")
        self._runs[run] = opened
        return opened


def plain_name(name: str) -> str:
    """A name that MLflow and TensorBoard take: `ItemNDCG@10` is `ItemNDCG_at_10` there."""
    return re.sub(r"[^\w\-./: ]", "_", name.replace("@", "_at_"))


def _milliseconds(time_iso: str) -> int | None:
    return int(datetime.fromisoformat(time_iso).timestamp() * 1000) if time_iso else None


def _as_table(words: dict[str, str]) -> str:
    rows = [
        f"| {name} | {json.dumps(value, ensure_ascii=False)} |" for name, value in words.items()
    ]
    return "\n".join(["| | |", "|---|---|", *rows])
