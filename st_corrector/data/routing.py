"""The modules of a model that a text passes through, as a query and as a document.

A ``Router`` may be anywhere in a model: first, after an encoder that both sides share, or inside a route. A text's
*task*, ``"query"`` or ``"document"``, decides its route, so every call passes the task, as ``model.encode_query`` and
``model.encode_document`` do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from torch import nn

from ..errors import InputError

QUERY, DOCUMENT = "query", "document"
"""The tasks, as sentence-transformers names them."""


def call(model: nn.Module, features: dict[str, Any]) -> dict[str, Any]:
    """The output of ``model`` for ``features``; if they have a task, every module gets it."""
    task = features.get("task")
    output: dict[str, Any] = model(features) if task is None else model(features, task=task)
    return output


def depends_on_task(model: nn.Module) -> bool:
    """Whether a model's output for a text depends on its task: it has a ``Router``, or a module that takes the task."""
    return any("task" in getattr(module, "forward_kwargs", ()) for module in model.modules())


def modules_for(model: SentenceTransformer, task: str) -> list[nn.Module]:
    """The modules that a text with ``task`` passes through, in order; of a ``Router`` those of the task's route.

    Raises:
        InputError: a Router has no route for the task.
    """
    passed: list[nn.Module] = []

    def go_through(modules: Iterable[nn.Module]) -> None:
        for module in modules:
            if isinstance(module, Router):
                go_through(module.sub_modules[_route(module, task)].children())
            else:
                passed.append(module)

    go_through(model.children())
    return passed


def _route(router: Router, task: str) -> str:
    """The route of a text with ``task``, in the lookup order of Router's documentation."""
    for key in ((task, "text"), (task, None), (None, "text"), (None, None)):
        if key in router.route_mappings:
            return str(router.route_mappings[key])
    for name in (task, "text"):
        if name in router.sub_modules:
            return name
    raise InputError(
        f"The model's Router has no route for the task {task!r}, only {list(router.sub_modules)}. Queries take the "
        "route 'query' and targets the route 'document': rename the routes, or map them, e.g. Router(…, "
        "route_mappings={('query', None): 'question', ('document', None): 'passage'})."
    )
