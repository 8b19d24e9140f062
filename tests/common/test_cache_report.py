"""Whatever moment a router connects in, it is told what a worker's cache has before it may send requests there."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.parts import LoadedModel, worker_parts
from tests.one_prefill_worker import OnePrefillWorker
from tests.one_worker import ROUTER, OneWorker, Wire, load_tiny

TURNS = 4


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("looks", range(5))  # that the engine takes at its connections before the router comes
def test_no_router_hears_of_a_workers_load_before_its_cache(
    loaded: LoadedModel, role: str, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, turn = itertools.count(), itertools.count()
    connections = property(lambda _: (ROUTER,) if next(look) >= looks else ())
    monkeypatch.setattr(Wire, "connections", connections, raising=False)
    lifecycle: Any = SimpleNamespace(draining=False, over=lambda idle: next(turn) == TURNS)
    parts = worker_parts(loaded, 8, 4)
    one = OneWorker(parts) if role == "decode" else OnePrefillWorker(parts, max_batch_tokens=16)
    one._engine.run(lifecycle)
    told = [message for message in one._wire.to_router if message.HasField("load") or message.HasField("cache")]
    assert told[0].cache.snapshot
    assert any(message.HasField("load") for message in told)
