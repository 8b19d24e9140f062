"""Workers: a real engine each, which makes a turn when the world says so. On a CPU it launches no step or batch before
the last one is read, on a GPU one; here it does either."""

import random
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from benchmarks.parts import LoadedModel, worker_parts
from common.kv.cache_report import CacheReport
from common.kv.kv_pool import layout_to_proto
from common.sampling.grammar import CompiledGrammars, GrammarTokenizer, load_tokenizer
from common.sampling.guided_sampling import GuidedSampling
from common.telemetry.tracing import Tracing
from common.worker.load_report import LoadReport
from common.worker.worker_service import WorkerService
from decode_worker.engine import Engine as DecodeEngine
from decode_worker.metrics import DecodeMetrics
from decode_worker.own_prompts import OwnPrompts
from decode_worker.runner import Runner as DecodeRunner
from prefill_worker.engine import Engine as PrefillEngine
from prefill_worker.metrics import PrefillMetrics
from prefill_worker.runner import Runner as PromptRunner
from router.cluster.workers import DECODE, PREFILL
from tests.one_worker import load_tiny
from tests.router import models
from tests.simulation.setting import BLOCK, FINGERPRINT, Setting
from tests.simulation.tasks import Tasks
from tests.simulation.wire import Wire


@dataclass(frozen=True, slots=True)
class Model:
    """What all workers share. Their grammars are each worker's own."""

    loaded: LoadedModel
    tokenizer: GrammarTokenizer

    @classmethod
    def load(cls, directory: Path) -> "Model":
        loaded = load_tiny(directory)
        return cls(loaded, load_tokenizer(directory, loaded.model.config))

    def guided(self, tasks: Tasks) -> LoadedModel:
        return replace(self.loaded, guided=GuidedSampling(_Grammars(self.tokenizer, tasks), models.VOCAB_SIZE, 1))


class _Grammars(CompiledGrammars):
    """Has no threads of its own."""

    def __init__(self, tokenizer: GrammarTokenizer, tasks: Tasks) -> None:
        self.tokenizer = tokenizer
        self._kept = OrderedDict()
        self._threads = cast(ThreadPoolExecutor, cast(Any, tasks))


class Host:
    """A worker's process.

    Attributes:
        address: where routers find it; whoever takes its place has the same.
        draining: it takes nothing new, and ends when it is idle.
        dead: its turns are over.
    """

    engine: PrefillEngine | DecodeEngine
    _load: LoadReport

    def __init__(self, address: str, serial: int, setting: Setting, guided: LoadedModel, rng: random.Random) -> None:
        self.address = address
        self.draining = False
        self.dead = False
        self.wire = Wire(address)
        self.parts = worker_parts(guided, rng.choice(setting.pools), BLOCK)
        instance = f"{address}-{serial}"
        hello = self.parts.hello
        hello.instance, hello.fingerprint, hello.guides = instance, FINGERPRINT, True
        hello.pool.instance, hello.pool.descriptor = instance, instance.encode()
        hello.pool.layout.CopyFrom(layout_to_proto(self.parts.pool.layout))
        self._service = cast(WorkerService, cast(Any, self.wire))
        self._cache = CacheReport(self._service, self.parts.blocks)

    @property
    def idle(self) -> bool:
        return self.engine._idle

    def turn(self, meanwhile: Callable[[], None]) -> None:
        """As its engine's `run` makes one. The streams are another thread's: something may happen `meanwhile`."""
        self.engine.turn(self.draining)
        meanwhile()
        self._load.send_if_due(ready=not self.draining)
        meanwhile()
        self._cache.send()
        self.wire.flush()


class PrefillHost(Host):
    engine: PrefillEngine

    def __init__(self, address: str, serial: int, setting: Setting, guided: LoadedModel, rng: random.Random) -> None:
        super().__init__(address, serial, setting, guided, rng)
        hello, metrics = self.parts.hello, PrefillMetrics()
        hello.role = PREFILL
        hello.max_batch = rng.choice([8, 16, 64])
        self.engine = PrefillEngine(
            self.parts,
            self._service,
            PromptRunner(self.parts),
            metrics,
            Tracing(),
            hello.max_batch,
            setting.lease_seconds,
        )
        self.engine._loop._batches_ahead = rng.randrange(2)
        self._load = LoadReport(self._service, metrics, self.engine._load)


class DecodeHost(Host):
    engine: DecodeEngine

    def __init__(self, address: str, serial: int, setting: Setting, guided: LoadedModel, rng: random.Random) -> None:
        super().__init__(address, serial, setting, guided, rng)
        hello, metrics = self.parts.hello, DecodeMetrics()
        hello.role = DECODE
        hello.max_batch = rng.choice([1, 2, 4, 8])
        if setting.prefills_in_place:
            hello.prefill_tokens = rng.choice([0, 0, 6, 64] if setting.prefill_workers else [1, 64])
            hello.prefill_overflow_tokens = rng.choice([0, 64])
        runner = DecodeRunner(self.parts, hello.max_batch)
        own = OwnPrompts(self.parts, PromptRunner(self.parts), chunk_tokens=rng.choice([4, 16]))
        self.engine = DecodeEngine(self.parts, self._service, runner, own, metrics, Tracing(), hello.max_batch)
        self.engine._loop._steps_ahead, own._loop._batches_ahead = rng.randrange(2), rng.randrange(2)
        self._load = LoadReport(self._service, metrics, self.engine._load, self.engine._claims.kept_from)
