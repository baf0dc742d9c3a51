"""What a generator learns at once: a mixture of tasks, each with a share of every global batch.

`next_item` is generative retrieval as ever. The others need a model that reads text: `search` (a
history and a query to the item that was wanted), `query_to_sid` (the same without the history),
`item_to_sid` (an item's text to its SID) and `sid_to_text` (back).

Source: the task families of LC-Rec (arXiv 2311.09049) as far as texts and queries allow. We differ
in fixed shares of each batch, where LC-Rec shuffles all examples, and in one template per task.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from forge_ray.errors import ConfigError

ITEM_TASK = "next_item"
QUERY_TASKS = ("search", "query_to_sid")
CATALOGUE_TASKS = ("item_to_sid", "sid_to_text")
TASKS = (ITEM_TASK, *QUERY_TASKS, *CATALOGUE_TASKS)
SEARCH_TASK, QUERY_TASK = QUERY_TASKS
_PLACES = {
    "search_prompt": ("history", "query"),
    "item_prompt": ("text",),
    "text_prompt": ("item",),
}


@dataclass(frozen=True, slots=True)
class Prompts:
    """What a model learned to be asked with; it is asked with nothing else.

    Attributes:
        histories: histories alone may stand before an answer, as in `next_item`.
        queries: queries may.
        beside: the history stands beside the query, as in `search`; without it the query stands
            alone, as in `query_to_sid`.
    """

    histories: bool = True
    queries: bool = False
    beside: bool = False

    def check(self, *, has_queries: bool, model: str = "the model") -> None:
        """Refuses questions in a form that no training row had.

        Args:
            has_queries: whether the users come with queries.
            model: what the message calls it.

        Raises:
            ConfigError: the model never learned to answer such questions.
        """
        if has_queries and not self.queries:
            raise ConfigError(
                "queries must go to a model that was trained with tasks.search or "
                f"tasks.query_to_sid, got {model}, which was not. Train one, or leave the queries "
                "out."
            )
        if has_queries or self.histories:
            return
        if self.queries:
            raise ConfigError(
                f"{model} must be asked with queries, as it was trained with tasks.next_item=0, "
                "got users without. Name a query set (--queries of gr eval and gr recommend), or "
                "train with a weight of tasks.next_item."
            )
        raise ConfigError(
            f"{model} must have learned tasks.next_item, tasks.search or tasks.query_to_sid to be "
            "asked for items, got none of them. Train with a weight of tasks.next_item."
        )

    def identity(self, *, has_queries: bool) -> dict[str, Any]:
        """What decides lists beside the model: the form of the questions.

        Nothing for histories, alone or beside queries: results of those are what they were before
        there was another form.
        """
        return {"asks": "query"} if has_queries and not self.beside else {}


HISTORIES = Prompts()
"""What models learn that read no text."""


def history_beside(task: str, max_history: int) -> int:
    """Newest items of a history that stand beside a query, in training and in decoding alike.

    Args:
        task: one of `QUERY_TASKS`.
        max_history: newest items of a history that the model reads.
    """
    return max_history if task == SEARCH_TASK else 0


@dataclass(kw_only=True)
class TasksConfig:
    """Weights of the tasks, and how they are put into words.

    A weight is a share of the rows of every global batch, relative to the sum; 0 leaves a task out.
    """

    next_item: float = 1.0
    """Histories to their next item; see `model.*` for its rows and prompt."""
    search: float = 0.0
    """Histories and queries to the item that was wanted."""
    query_to_sid: float = 0.0
    """Queries alone to the item that was wanted."""
    item_to_sid: float = 0.0
    """Texts of items to their SIDs."""
    sid_to_text: float = 0.0
    """SIDs to the texts of their items."""
    queries: str = ""
    """Query set of the dataset, for `search` and `query_to_sid`."""
    column: str = "title"
    """Column of the items that `item_to_sid` reads and `sid_to_text` writes."""
    search_prompt: str = "{history} query: {query} item:"
    """Template of `search` and `query_to_sid`, in training and in decoding."""
    item_prompt: str = "text: {text} item:"
    """Template of `item_to_sid`."""
    text_prompt: str = "item: {item} text:"
    """Template of `sid_to_text`."""
    max_tokens: int = 32
    """Leading text tokens that are kept of a query or of an item's text."""
    validate: Literal["next_item", "search"] = "next_item"
    """Task whose validation rows choose the published weights: users, or the query set's rows,
    asked as in evaluation. Must be one that is learned."""

    def __post_init__(self) -> None:
        """Checks weights and templates."""
        if min(self.weights.values()) < 0 or sum(self.weights.values()) <= 0:
            raise ConfigError(
                f"tasks must have weights >= 0 and one above, got {self.weights}. Use e.g. "
                "tasks.next_item=1 tasks.search=1."
            )
        if self.max_tokens < 1:
            raise ConfigError(f"tasks.max_tokens must be >= 1, got {self.max_tokens}. Use e.g. 32.")
        if self.needs_queries and not self.queries:
            raise ConfigError(
                "tasks.queries must name a query set for tasks.search, tasks.query_to_sid and "
                "tasks.validate=search, got none. Make one with `forge-ray data queries`."
            )
        if self.validate == "search" and not any(self.weights[one] for one in QUERY_TASKS):
            raise ConfigError(
                "tasks.validate must be next_item where no query is learned, got search. Give "
                "tasks.search a weight."
            )
        for name, places in _PLACES.items():
            _check_template(name, getattr(self, name), places)

    @property
    def weights(self) -> dict[str, float]:
        """Weight by task."""
        return {name: float(getattr(self, name)) for name in TASKS}

    @property
    def text_tasks(self) -> tuple[str, ...]:
        """Tasks of the mixture with text in them."""
        return tuple(name for name in TASKS[1:] if self.weights[name])

    @property
    def prompts(self) -> Prompts:
        """What a model of this mixture may be asked with; of two forms, the one that says more."""
        return Prompts(
            histories=bool(self.weights[ITEM_TASK]),
            queries=any(self.weights[name] for name in QUERY_TASKS),
            beside=bool(self.weights[SEARCH_TASK]),
        )

    def check_validation(self) -> None:
        """Refuses to choose weights by questions that the model does not learn.

        Not part of `__post_init__`: models that were published before must still be read.

        Raises:
            ConfigError: `validate` names the next item, and no training row asks for it.
        """
        if self.validate == ITEM_TASK and not self.prompts.histories:
            raise ConfigError(
                "tasks.validate must be a task that is learned, got next_item with "
                "tasks.next_item=0. Set tasks.validate=search where queries are learned, or give "
                "tasks.next_item a weight."
            )

    @property
    def needs_queries(self) -> bool:
        """Whether a query set is read."""
        return self.validate == "search" or any(self.weights[name] for name in QUERY_TASKS)

    def shares(self, global_batch: int) -> dict[str, int]:
        """Rows of each task of the mixture in a global batch, at least one each.

        Args:
            global_batch: rows of one optimiser step.

        Raises:
            ConfigError: there are fewer rows than tasks.
        """
        names = [name for name in TASKS if self.weights[name]]
        if global_batch < len(names):
            raise ConfigError(
                f"engine.global_batch must be >= {len(names)} for as many tasks, got "
                f"{global_batch}. Raise it."
            )
        weights = np.array([self.weights[name] for name in names])
        wanted = global_batch * weights / weights.sum()
        rows = np.floor(wanted).astype(int)
        # Largest remainders; the first of equal ones.
        order = np.argsort(-(wanted - rows), kind="stable")
        rows[order[: global_batch - int(rows.sum())]] += 1
        for rare in np.flatnonzero(rows == 0):
            rows[rare] += 1
            rows[np.argmax(rows)] -= 1
        return dict(zip(names, rows.tolist(), strict=True))


def _check_template(name: str, template: str, places: tuple[str, ...]) -> None:
    try:
        found = [place for _, place, _, _ in string.Formatter().parse(template) if place]
    except ValueError as error:
        raise ConfigError(
            f"tasks.{name} must be a template, got {template!r}: {error}. Double a brace that is "
            "meant."
        ) from error
    if sorted(found) != sorted(places):
        wanted = " and ".join(f"{{{place}}}" for place in places)
        raise ConfigError(
            f"tasks.{name} must hold {wanted} once each, got {template!r}. Write it in."
        )
