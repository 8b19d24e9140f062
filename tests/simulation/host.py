"""Workers: a real engine each, which makes a turn when the world says so. On a CPU an engine launches no step or batch
before it has read the last one, on a GPU one; here it does either."""

import random
from collections.abc import Callable
from dataclasses import replace

from benchmarks.parts import LoadedModel, worker_parts
from common.kv.host_cache import HostCache
from common.kv.kv_pool import layout_to_proto
from common.telemetry.tracing import Tracing
from common.worker.cache_report import CacheReport
from common.worker.load_report import LoadReport
from decode_worker.engine import Engine as DecodeEngine
from decode_worker.metrics import DecodeMetrics
from decode_worker.own_prompts import OwnPrompts
from decode_worker.runner import Runner as DecodeRunner
from prefill_worker.engine import Engine as PrefillEngine
from prefill_worker.metrics import PrefillMetrics
from prefill_worker.runner import Runner as PromptRunner
from router.cluster.workers import DECODE, PREFILL
from tests.simulation.host_memories import HostMemories, SlowMemory
from tests.simulation.setting import BLOCK, FINGERPRINT, Setting
from tests.simulation.wire import Wire


class Host:
    """A worker's process.

    Attributes:
        memory: that keeps blocks beside its pool, if any does.
        address: where routers find it; whoever takes its place has the same.
        draining: it takes nothing new, and ends when it is idle.
        dead: its turns are over.
    """

    engine: PrefillEngine | DecodeEngine
    _load: LoadReport

    def __init__(
        self,
        address: str,
        serial: int,
        model: LoadedModel,
        setting: Setting,
        memories: HostMemories,
        rng: random.Random,
    ) -> None:
        self.address = address
        self.draining = False
        self.dead = False
        self.wire = Wire(address)
        self.parts = worker_parts(model, rng.choice(setting.pools), BLOCK)
        self.memory: SlowMemory | None = None
        if slots := rng.choice(setting.host_memories):
            self.memory = memories.beside(self.parts.pool, slots)
            self.parts = replace(self.parts, host_cache=HostCache(self.parts.blocks, self.memory))
        self.hello = hello = self.parts.hello
        hello.instance = hello.pool.instance = f"{address}-{serial}"
        hello.pool.descriptor = hello.instance.encode()
        hello.pool.layout.CopyFrom(layout_to_proto(self.parts.pool.layout))
        hello.fingerprint, hello.guides, hello.host_blocks = FINGERPRINT, True, slots
        self._cache = CacheReport(self.wire, *self.parts.caches)
        self._begin(setting, rng)

    def _begin(self, setting: Setting, rng: random.Random) -> None:
        raise NotImplementedError

    @property
    def idle(self) -> bool:
        return self.engine._idle

    def turn(self, meanwhile: Callable[[], object]) -> None:
        """As its engine's `run` makes one. The streams are another thread's: something may happen `meanwhile`."""
        self.engine.turn(self.draining)
        meanwhile()
        self._load.send_if_due(ready=not self.draining)
        meanwhile()
        self._cache.send()
        self.wire.flush()


class PrefillHost(Host):
    engine: PrefillEngine

    def _begin(self, setting: Setting, rng: random.Random) -> None:
        self.hello.role, self.hello.max_batch = PREFILL, rng.choice([8, 16, 64])
        metrics, lease = PrefillMetrics(), setting.lease_seconds
        runner, most = PromptRunner(self.parts), self.hello.max_batch
        self.engine = PrefillEngine(self.parts, self.wire, runner, metrics, Tracing(), most, lease)
        self.engine._loop._batches_ahead = rng.randrange(2)
        self._load = LoadReport(self.wire, metrics, self.engine._load)


class DecodeHost(Host):
    engine: DecodeEngine

    def _begin(self, setting: Setting, rng: random.Random) -> None:
        self.hello.role, self.hello.max_batch = DECODE, rng.choice([1, 2, 4, 8])
        if setting.prefills_in_place:
            self.hello.prefill_tokens = rng.choice([0, 0, 6, 64] if setting.prefill_workers else [1, 64])
            self.hello.prefill_overflow_tokens = rng.choice([0, 64])
            self.hello.prefill_overflow_seconds = rng.choice([0, 0.1])
        metrics, most = DecodeMetrics(), self.hello.max_batch
        own = OwnPrompts(self.parts, PromptRunner(self.parts), chunk_tokens=rng.choice([4, 16]))
        runner = DecodeRunner(self.parts, most, setting.drafts)
        self.engine = DecodeEngine(self.parts, self.wire, runner, own, metrics, Tracing(), most)
        self.engine._loop._steps_ahead, own._loop._batches_ahead = rng.randrange(2), rng.randrange(2)
        self._load = LoadReport(self.wire, metrics, self.engine._load, self.engine._claims.kept_from)
