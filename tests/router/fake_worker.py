"""A worker that needs no model: it speaks the whole protocol, makes tokens by a rule, and fails on demand."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import grpc

from common.network.grpc_options import PEERS
from tests.router import models
from twostroke.v1 import inference_pb2, worker_pb2, worker_pb2_grpc

PREFILL = inference_pb2.WORKER_ROLE_PREFILL
DECODE = inference_pb2.WORKER_ROLE_DECODE
HEARTBEAT_SECONDS = 0.1
MOST_UNSENT = 64  # messages, beyond which it makes no more tokens; a real worker joins them
Ended = worker_pb2.Ended

_instances = itertools.count()


def counting(length: int) -> int:
    """The token at place `length` of every sequence: what a resumed sequence has to go on with."""
    return 40 + length % 50


@dataclass(slots=True)
class Script:
    """What a fake worker does otherwise than a good one. Counts are of attempts, in the order they come."""

    token: Callable[[int], int] = counting  # of the place in the sequence
    refuse: int = 0  # so many reservations
    reject: int = 0
    fail: int = 0  # at once
    full: int = 0
    drain: int = 0  # so many are turned away
    preempt: int = 0  # before they have a token
    end_after: dict[int, list["Ended.Cause.ValueType"]] = field(
        default_factory=dict
    )  # decode: tokens -> causes to use up
    no_logprobs: int = 0  # so many first tokens come without those that were asked for
    lose_lease: int = 0  # decode: at Start
    fails_to_pull_from: str = ""  # decode: instance of a prefill worker
    silent: bool = False  # takes everything and answers nothing
    silent_at_start: bool = False  # decode: reserves, and never starts
    stop_after: int | None = None  # decode: goes silent after so many tokens of a sequence
    step_seconds: float = 0.0
    prefill_seconds: float = 0.0
    prefill_when: asyncio.Event | None = None  # prefills nothing before it is set
    silent_at_prefill: bool = False  # decode: reserves, and never prefills
    unreadable: dict[str, str] = field(default_factory=dict)  # decode: why it can't read pools, by instance
    silent_of_pools: bool = False  # decode: never says whether it can


@dataclass(slots=True)
class Running:
    length: int
    max_length: int
    stops: frozenset[int]
    steps: int = 0


class FakeWorker(worker_pb2_grpc.WorkerServicer):
    """Serves one router. `attempts` is what it holds now; after every fault it must come back to nothing."""

    def __init__(self, role: inference_pb2.WorkerRole.ValueType, script: Script | None = None, **hello: Any) -> None:
        self.role = role
        self.script = script or Script()
        self.instance = _new_instance()
        self.blocks = hello.pop("num_blocks", 4096)
        layout = worker_pb2.KvLayout(
            num_blocks=self.blocks,
            num_layers=2,
            block_size=hello.pop("block_size", 16),
            num_kv_heads=1,
            head_dim=8,
            dtype="float32",
        )
        pool = worker_pb2.PoolHandle(instance=self.instance, transport="shm", descriptor=b"fake", layout=layout)
        fields: dict[str, Any] = {
            "instance": self.instance,
            "role": role,
            "model": "fake",
            "pool": pool,
            "fingerprint": "f" * 32,
            "max_length": 2048,
            "max_batch": 2048,
            "version": version("twostroke"),
            "dtype": "float32",
            "vocab_size": models.VOCAB_SIZE,
            "eos_token_ids": [models.EOS],
            "guides": True,  # so it says
        }
        self.hello = worker_pb2.WorkerHello(**(fields | hello))
        self.held: dict[int, worker_pb2.Sequence] = {}
        self.running: dict[int, Running] = {}
        self.prefills: list[worker_pb2.Prefill] = []
        self.reserves: list[worker_pb2.Reserve] = []
        self.starts: list[worker_pb2.Start] = []
        self.pools: list[worker_pb2.PoolHandle] = []
        self.ended: list[int] = []
        self.claims: list[int] = []
        self.refusals: list[str] = []
        self.ready = True
        self.others = 0  # sequences of another router
        self.hung = False  # its gRPC side lives on, and nothing behind it
        self._out: asyncio.Queue[worker_pb2.WorkerMessage] = asyncio.Queue()
        self._something_runs = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------ life

    async def start(self, address: str = "127.0.0.1:0") -> str:
        options = [*PEERS, ("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)]
        self._server = grpc.aio.server(options=options)
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(address)
        await self._server.start()
        self.address = f"127.0.0.1:{port}"
        self._spawn(self._decode())
        return self.address

    async def die(self) -> None:
        """As if killed: the stream breaks, nothing is said before."""
        for task in self._tasks:
            task.cancel()
        await self._server.stop(grace=None)
        self._forget()

    def renew(self) -> None:
        """As if it had started anew at its address; the router hears of it when it registers."""
        self.instance = self.hello.instance = self.hello.pool.instance = _new_instance()

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def Connect(self, requests: AsyncIterator[worker_pb2.RouterMessage], context: Any) -> None:  # type: ignore[override]
        hello = await anext(requests)
        assert hello.HasField("hello")
        # The stream before may be told of its end later than this one begins: what belongs to a stream is kept apart.
        out: asyncio.Queue[worker_pb2.WorkerMessage] = asyncio.Queue()
        self._out = out
        self._forget()
        await context.write(worker_pb2.WorkerMessage(hello=self.hello))
        heart = asyncio.ensure_future(self._beat())
        writer = asyncio.ensure_future(self._write(context, out))
        try:
            async for message in requests:
                if self._out is not out:
                    break
                self._received(message)
        finally:
            heart.cancel()
            writer.cancel()
            if self._out is out:
                self._forget()

    def _forget(self) -> None:
        self.held.clear()
        self.running.clear()

    async def _write(self, context: Any, out: asyncio.Queue[worker_pb2.WorkerMessage]) -> None:
        while True:
            await context.write(await out.get())

    async def _beat(self) -> None:
        while True:
            if not self.hung:
                self.report()
            await asyncio.sleep(HEARTBEAT_SECONDS)

    # ------------------------------------------------------------ what it says

    def send(self, **message: Any) -> None:
        self._out.put_nowait(worker_pb2.WorkerMessage(**message))

    def end(self, attempt_id: int, cause: "Ended.Cause.ValueType", detail: str = "scripted") -> None:
        self.held.pop(attempt_id, None)
        self.running.pop(attempt_id, None)
        self.send(ended=[Ended(attempt_id=attempt_id, cause=cause, detail=detail)])

    def report(self) -> None:
        self.send(load=self._load())

    def _load(self) -> inference_pb2.WorkerLoad:
        in_use = sum(_blocks(len(sequence.token_ids)) for sequence in self.held.values())
        promised = sum(
            _blocks(len(reserve.sequence.token_ids) + reserve.headroom_tokens)
            - _blocks(len(reserve.sequence.token_ids))
            for reserve in self.reserves
            if reserve.attempt_id in self.held
        )
        blocks = inference_pb2.Blocks(
            total=self.blocks, free=self.blocks - in_use, in_use=in_use, reserved=min(promised, self.blocks - in_use)
        )
        running = len(self.held) + self.others
        return inference_pb2.WorkerLoad(role=self.role, ready=self.ready, running=running, blocks=blocks)

    # ------------------------------------------------------------ what it hears

    def _received(self, message: worker_pb2.RouterMessage) -> None:
        if self.hung:
            return
        if message.refused:
            self.refusals.append(message.refused)
        for prefill in message.prefills:
            self.prefills.append(prefill)
            if self._takes(prefill.attempt_id, prefill.sequence):
                self._spawn(self._prefill(prefill))
        for pool in message.pools:
            self.pools.append(pool)
            if not self.script.silent_of_pools:
                problem = self.script.unreadable.get(pool.instance, "")
                self.send(opened=[worker_pb2.PoolOpened(instance=pool.instance, problem=problem)])
        for reserve in message.reserves:
            self.reserves.append(reserve)
            if self._takes(reserve.attempt_id, reserve.sequence):
                self._reserve(reserve)
                if reserve.prefill and reserve.attempt_id in self.held and not self.script.silent_at_prefill:
                    self._spawn(self._prefill_here(reserve))
        if message.HasField("claimed_blocks"):
            self.claims.append(message.claimed_blocks)
        for start in message.starts:
            self.starts.append(start)
            if start.attempt_id in self.held and not self.script.silent_at_start:
                self._start(start)
        for attempt_id in message.ended:  # last: the same message may bring an attempt and take it back
            self.ended.append(attempt_id)
            self.held.pop(attempt_id, None)
            self.running.pop(attempt_id, None)

    def _takes(self, attempt_id: int, sequence: worker_pb2.Sequence) -> bool:
        assert attempt_id not in self.held, "an attempt's id was used twice"
        self.held[attempt_id] = sequence
        if self.script.silent:
            return False
        causes = (
            ("reject", Ended.CAUSE_REJECTED),
            ("fail", Ended.CAUSE_FAILED),
            ("full", Ended.CAUSE_FULL),
            ("drain", Ended.CAUSE_DRAINING),
            ("preempt", Ended.CAUSE_PREEMPTED),
        )
        for name, cause in causes:
            if getattr(self.script, name) > 0:
                setattr(self.script, name, getattr(self.script, name) - 1)
                self.end(attempt_id, cause)
                return False
        return True

    async def _prefill(self, prefill: worker_pb2.Prefill) -> None:
        blocks = -(-len(prefill.sequence.token_ids) // self.hello.pool.layout.block_size)
        kv = worker_pb2.KvLocation(pool=self.hello.pool, block_ids=range(blocks), generations=[1] * blocks)
        await self._first_token(prefill, cached_tokens=3, kv=kv)

    async def _prefill_here(self, reserve: worker_pb2.Reserve) -> None:
        token = await self._first_token(reserve, cached_tokens=6)
        if token is None:
            return
        sequence = reserve.sequence
        if token in sequence.stop_token_ids or len(sequence.token_ids) + 1 >= sequence.max_length:
            self.end(reserve.attempt_id, Ended.CAUSE_FINISHED)
        else:
            self._run(reserve.attempt_id, sequence)

    async def _first_token(self, asked: worker_pb2.Prefill | worker_pb2.Reserve, **where: Any) -> int | None:
        """Announces it; None where the attempt ended before."""
        if self.script.prefill_seconds:
            await asyncio.sleep(self.script.prefill_seconds)
        if self.script.prefill_when is not None:
            await self.script.prefill_when.wait()
        if asked.attempt_id not in self.held:
            return None
        token = self.script.token(len(asked.sequence.token_ids))
        logprobs = _logprobs(token, asked.sequence)
        if self.script.no_logprobs > 0:
            self.script.no_logprobs -= 1
            logprobs = None
        self.send(
            prefilled=[worker_pb2.Prefilled(attempt_id=asked.attempt_id, first_token=token, logprobs=logprobs, **where)]
        )
        return token

    def _run(self, attempt_id: int, sequence: worker_pb2.Sequence) -> None:
        self.running[attempt_id] = Running(
            len(sequence.token_ids) + 1, sequence.max_length, frozenset(sequence.stop_token_ids)
        )
        self._something_runs.set()

    def _reserve(self, reserve: worker_pb2.Reserve) -> None:
        refused = self.script.refuse > 0
        if refused:
            self.script.refuse -= 1
            del self.held[reserve.attempt_id]
        self.send(reserved=[worker_pb2.Reserved(attempt_id=reserve.attempt_id, refused=refused, cached_tokens=5)])

    def _start(self, start: worker_pb2.Start) -> None:
        if self.script.lose_lease > 0:
            self.script.lose_lease -= 1
            self.end(start.attempt_id, Ended.CAUSE_LEASE_LOST)
            return
        if self.script.fails_to_pull_from == start.kv.pool.instance:
            self.end(start.attempt_id, Ended.CAUSE_FAILED)
            return
        self.send(started=[worker_pb2.Started(attempt_id=start.attempt_id, transfer_ms=1.5)])
        self._run(start.attempt_id, self.held[start.attempt_id])

    # ------------------------------------------------------------ decoding

    async def _decode(self) -> None:
        next_step = time.monotonic()
        while True:
            if not self.running:
                self._something_runs.clear()
                await self._something_runs.wait()
            next_step = max(next_step + self.script.step_seconds, time.monotonic())
            await asyncio.sleep(next_step - time.monotonic())
            if self._out.qsize() <= MOST_UNSENT:
                message = self._step()
                if message.tokens.token_ids or message.ended:
                    self._out.put_nowait(message)
                    continue
            await asyncio.sleep(0.001)  # it must not spin while there is nothing to say

    def _step(self) -> worker_pb2.WorkerMessage:
        script = self.script
        tokens: dict[int, int] = {}
        ended: list[worker_pb2.Ended] = []
        for attempt_id, running in self.running.items():
            if self.hung:
                break
            if script.stop_after is not None and running.steps >= script.stop_after:
                continue
            if causes := script.end_after.get(running.steps):
                ended.append(Ended(attempt_id=attempt_id, cause=causes.pop(0), detail="scripted"))
                continue
            tokens[attempt_id] = token = script.token(running.length)
            running.length += 1
            running.steps += 1
            if token in running.stops or running.length >= running.max_length:
                ended.append(Ended(attempt_id=attempt_id, cause=Ended.CAUSE_FINISHED))
        logprobs = [_logprobs(token, self.held[attempt_id]) for attempt_id, token in tokens.items()]
        packed = worker_pb2.StepTokens(attempt_ids=tokens.keys(), token_ids=tokens.values())
        if any(logprobs):
            packed.logprobs.extend(entry or worker_pb2.Logprobs() for entry in logprobs)
        for end in ended:
            del self.held[end.attempt_id], self.running[end.attempt_id]
        return worker_pb2.WorkerMessage(tokens=packed, ended=ended)


def _new_instance() -> str:
    return f"fake-{next(_instances)}"


def _blocks(tokens: int) -> int:
    return -(-tokens // 16)


def _logprobs(token: int, sequence: worker_pb2.Sequence) -> worker_pb2.Logprobs | None:
    if not sequence.sampling.HasField("logprobs"):
        return None
    top: Iterable[int] = range(token, token + sequence.sampling.logprobs)
    return worker_pb2.Logprobs(logprob=-0.5, top_ids=top, top_logprobs=[-0.5 - place for place, _ in enumerate(top)])
