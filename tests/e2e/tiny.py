"""Clusters of a tiny random model: its answers mean nothing, are the same every time, and cost next to nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.e2e.cluster import Cluster
from tests.router import models

CONTEXT_LENGTH = models.CONTEXT_LENGTH


def tiny_cluster(directory: Path, worker_flags: Mapping[str, object] | None = None, **fields: Any) -> Cluster:
    """Writes the model to `directory`, and serves it. Fields are `Cluster`'s."""
    models.write(directory, models.byte_level())
    model = {"model": directory}
    fields["router_flags"] = {**model, **fields.get("router_flags", {})}
    return Cluster(worker_flags={**model, "load-format": "dummy", "num-blocks": 1024, **(worker_flags or {})}, **fields)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [5 + (7 * place + 31 * seed + place * place) % 590 for place in range(length)]
