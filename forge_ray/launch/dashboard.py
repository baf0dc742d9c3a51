"""One web page per sweep and its studies beside it: links, optuna-dashboard, report; reads only.

Everything is made when it is asked for, from the ledger and the Optuna storage, so it works before,
beside and after the driver. Ray is not started and not asked: a running sweep says in its ledger
where its Ray serves a dashboard.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from optuna_dashboard import wsgi

from forge_ray.config import load_config
from forge_ray.errors import ConfigError
from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.ledger import Ledger, SweepLock
from forge_ray.sweep.progress import progress
from forge_ray.sweep.report import render_report
from forge_ray.sweep.runner import SAVED
from forge_ray.sweep.study import study_name
from forge_ray.sweep.study_view import StudySource, StudyView

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

logger = logging.getLogger(__name__)

_SERVERS = {"Grafana": "RAY_GRAFANA_HOST", "Prometheus": "RAY_PROMETHEUS_HOST"}


@dataclass(frozen=True, kw_only=True)
class ShownSweep:
    """A sweep and where its memory is."""

    config: SweepConfig
    folder: Path

    @property
    def source(self) -> StudySource:
        """Its studies."""
        return StudySource(
            sweep=self.config.name,
            metrics=tuple(self.config.objectives or [self.config.metric]),
            current=study_name(self.config.name, self.config.space, self.config.aims),
            url=self.config.storage,
            folder=self.folder,
        )


def sweeps_in(store: Path) -> list[ShownSweep]:
    """The sweeps that a local store holds, by name."""
    return [
        ShownSweep(config=load_config(SweepConfig, path=path), folder=path.parent)
        for path in sorted(store.glob(f"sweeps/*/{SAVED}"))
    ]


class Dashboard:
    """WSGI application; see the module docstring.

    Args:
        sweeps: What to show, at least one.
    """

    def __init__(self, sweeps: Sequence[ShownSweep]) -> None:
        self._sweeps = list(sweeps)
        self._view = StudyView([one.source for one in sweeps])
        self._studies = wsgi(self._view)
        environment = Environment(
            loader=PackageLoader("forge_ray.launch", "."),
            autoescape=select_autoescape(default=True, default_for_string=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._template = environment.get_template("dashboard.html.j2")

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answers one request."""
        path = str(environ.get("PATH_INFO", "")) or "/"
        if environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            return _answer(start_response, "405 Method Not Allowed", "This dashboard only reads.")
        if path == "/":
            return _answer(start_response, "200 OK", self.links(), kind="text/html")
        found = re.fullmatch(r"/report/(\d+)", path)
        if found is None:
            return self._studies(environ, start_response)
        if int(found[1]) >= len(self._sweeps):
            return _answer(start_response, "404 Not Found", "No such sweep.")
        return _answer(start_response, "200 OK", self.report(int(found[1])), kind="text/html")

    def links(self) -> str:
        """The first page: each sweep with its state, and where to see more of it."""
        rows = []
        for place, sweep in enumerate(self._sweeps):
            studies = self._view.studies_of(place)
            rows.append(_row(place, sweep, [(one._study_id, one.study_name) for one in studies]))
        return str(self._template.render(sweeps=rows, servers=server_links(os.environ)))

    def report(self, place: int) -> str:
        """The report of what is known now; nothing is written."""
        sweep = self._sweeps[place]
        return render_report(
            Ledger(sweep.folder).read(),
            sweep.config,
            is_running=SweepLock(sweep.folder).is_held(),
        )


def serve(app: Dashboard, *, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serves until Ctrl-C.

    Args:
        app: What to serve.
        host: Address to listen on.
        port: Port; 0 takes a free one.
        ready: Told the page's address once it answers.

    Raises:
        ConfigError: The address is taken or not ours.
    """
    with make_dashboard_server(app, host=host, port=port) as server:
        ready(f"http://{host}:{server.server_port}")
        with contextlib.suppress(KeyboardInterrupt):  # the wanted end
            server.serve_forever()


def make_dashboard_server(app: Dashboard, *, host: str, port: int) -> WSGIServer:
    """A server that listens and is not running yet; raises as `serve` does."""
    try:
        return make_server(host, port, app, server_class=_Server, handler_class=_QuietHandler)
    except OSError as error:
        raise ConfigError(
            f"--host and --port must be free to listen on, got {host}:{port}: {error}. "
            "Pass another port; 0 takes a free one."
        ) from error


class _Server(ThreadingMixIn, WSGIServer):
    # The page asks for several things at once, and a report takes a second.
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


def _answer(
    start_response: StartResponse, status: str, text: str, *, kind: str = "text/plain"
) -> list[bytes]:
    content = text.encode()
    start_response(
        status,
        [("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(content)))],
    )
    return [content]


def _row(place: int, sweep: ShownSweep, studies: list[tuple[int, str]]) -> dict[str, Any]:
    metric = sweep.config.metric
    state = progress(
        Ledger(sweep.folder).read(),
        metric=metric,
        is_running=SweepLock(sweep.folder).is_held(),
    )
    told = state.counts
    return {
        "name": sweep.config.name,
        "folder": str(sweep.folder),
        "state": "running" if state.is_running else "not running",
        "ended": told["trials"] - told["open"],
        "planned": state.planned,
        "counts": {name: value for name, value in told.items() if name != "trials"},
        "elapsed": str(timedelta(seconds=round(state.elapsed_s))),
        "metric": metric,
        "best": state.best,
        "ray": state.dashboard if _is_page(state.dashboard) else "",
        "report": f"/report/{place}",
        "studies": [
            {"url": f"/dashboard/studies/{number}", "name": name} for number, name in studies
        ],
        "trackers": tracker_links(sweep.config, sweep.folder),
    }


def server_links(environ: Mapping[str, str]) -> list[dict[str, str]]:
    """Grafana and Prometheus where Ray's own variables say that they are."""
    places = {name: environ.get(variable, "") for name, variable in _SERVERS.items()}
    return [
        {"name": name, "url": place}
        for name, place in places.items()
        if _is_page(place)  # Ray takes `DISABLED` too
    ]


def _is_page(url: str) -> bool:
    # Other schemes may run what a ledger or a variable says: `javascript:`.
    return url.startswith(("http://", "https://"))


def tracker_links(config: SweepConfig, folder: Path) -> list[dict[str, str]]:
    """The sweep's trackers: an address where there is one, else the command that shows it."""
    asked, links = config.trackers, []
    if asked.mlflow is not None:
        place = asked.mlflow.tracking_uri or f"sqlite:///{folder.resolve() / 'mlflow.db'}"
        command = shlex.join(["mlflow", "ui", "--backend-store-uri", place])
        url = place if _is_page(place) else ""
        links.append({"name": "MLflow", "url": url, "command": command})
    if asked.tensorboard is not None:
        place = asked.tensorboard.folder or str(folder / "tensorboard")
        command = shlex.join(["tensorboard", "--logdir", place])
        links.append({"name": "TensorBoard", "url": "", "command": command})
    if asked.wandb is not None:
        url = "https://wandb.ai/home" if asked.wandb.mode == "online" else ""
        command = f"wandb sync --append {shlex.quote(str(folder / 'wandb'))}/offline-run-*"
        links.append({"name": "Weights & Biases", "url": url, "command": command})
    return links
