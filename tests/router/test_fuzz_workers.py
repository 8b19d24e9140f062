"""A worker that says what it should not, of attempts that it has and of others: the client gets its answer or a code,
nothing is held, and once the worker behaves, the next request is answered."""

import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from tests import messages
from tests.router.cluster import Background, Cluster, background, eventually, request
from tests.router.fake_worker import DECODE, PREFILL, FakeWorker, Script
from twostroke.v1 import inference_pb2 as pb
from twostroke.v1 import worker_pb2

MESSAGE = worker_pb2.WorkerMessage.DESCRIPTOR
FIELDS = [path for path in messages.paths(MESSAGE) if path.names[0] != "hello"]  # said once more it is passed over
MOMENTS = ("asked", "started", "running", "told", "answered")

# What may come of it. Not DEADLINE_EXCEEDED: the worker goes on, or is cut off, and then the request goes on elsewhere.
FINE = {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INVALID_ARGUMENT}

_marks = itertools.count()


class Saboteur(FakeWorker):
    """A good worker but for one moment, at which it says what it was given to say."""

    def __init__(self, role: pb.WorkerRole.ValueType) -> None:
        super().__init__(role, Script(step_seconds=0.001))
        self.words: list[worker_pb2.WorkerMessage] = []
        self.moment = ""
        self.mark = ""  # in every load that it reports

    def _received(self, message: worker_pb2.RouterMessage) -> None:
        if message.prefills or message.reserves:
            prompts: list[worker_pb2.Prefill | worker_pb2.Reserve] = [*message.prefills, *message.reserves]
            self.speak("asked", [asked.attempt_id for asked in prompts])
        super()._received(message)
        if message.starts:
            self.speak("started", list(self.held))
        if message.ended:
            self.speak("told", list(message.ended))

    def _step(self) -> worker_pb2.WorkerMessage:
        if any(running.steps >= 2 for running in self.running.values()):
            self.speak("running", list(self.running))
        return super()._step()

    def _load(self) -> pb.WorkerLoad:
        load = super()._load()
        load.instance = self.mark  # which the router does not look at
        return load

    def behave(self) -> None:
        """From now on. What it holds of attempts that it called over is its own affair."""
        self.speak("answered", list(self.held))
        self.moment = ""
        self._forget()
        self.mark = f"behind the words {next(_marks)}"
        self.report()

    def speak(self, moment: str, attempts: Sequence[int]) -> None:
        if moment == self.moment:
            words, self.words = self.words, []
            for message in words:
                self._out.put_nowait(_about(message, attempts))


def _about(message: worker_pb2.WorkerMessage, attempts: Sequence[int]) -> worker_pb2.WorkerMessage:
    """The message with attempts that there are in the place of small ids."""
    made = worker_pb2.WorkerMessage()
    made.CopyFrom(message)
    about: list[worker_pb2.Prefilled | worker_pb2.Reserved | worker_pb2.Started | worker_pb2.Ended]
    about = [*made.prefilled, *made.reserved, *made.started, *made.ended]
    for said in about:
        said.attempt_id = attempts[0] if said.attempt_id < 4 and attempts else said.attempt_id
    named = [attempts[0] if attempt < 4 and attempts else attempt for attempt in made.tokens.attempt_ids]
    made.tokens.attempt_ids[:] = named
    return made


def plausible(field: FieldDescriptor) -> st.SearchStrategy[Any] | None:
    if field.name.startswith("attempt_id"):
        return st.integers(0, 3)
    if field.name in ("first_token", "token_ids", "top_ids"):
        return st.integers(40, 89)
    if field.name == "published":
        return st.binary(min_size=32, max_size=32)
    return None


@pytest.fixture(scope="module")
def router(model: Path) -> Iterator[Background]:
    saboteurs = {"prefills": [Saboteur(PREFILL)], "decodes": [Saboteur(DECODE)]}
    with background(model, worker_grace=0.1, **saboteurs) as running:
        yield running


def outcome(call: Any, asked: Message) -> grpc.StatusCode:
    code: grpc.StatusCode = call.future(asked, timeout=10).code()
    return code


def sabotage(
    router: Background, role: pb.WorkerRole.ValueType, moment: str, words: list[worker_pb2.WorkerMessage]
) -> None:
    saboteur = next(worker for worker in router.cluster.workers if worker.role == role)
    assert isinstance(saboteur, Saboteur)
    saboteur.words, saboteur.moment = words, moment
    asked = request(max_tokens=8, response=pb.ResponseOptions(logprobs=1 if words and len(words) % 2 else None))
    assert outcome(router.stub.Generate, asked) in FINE
    router.run(recover(router.cluster, saboteur))
    router.assert_well()


async def recover(cluster: Cluster, saboteur: Saboteur) -> None:
    saboteur.behave()
    await eventually(lambda: _recovered(cluster, saboteur), seconds=25)


def _recovered(cluster: Cluster, saboteur: Saboteur) -> bool:
    """The router has taken in all that was said, and has all workers.

    Words may be on their way for longer than the request that they were said of, and cut the worker off, or have it
    retired, only then. A worker that was cut off is connected to again soon, and one that said it was draining is not
    used again; not to wait for either, it registers, the latter as if it had started anew."""
    registry = cluster.router.registry
    connected = {worker.instance: worker for worker in registry.connected}
    for worker in cluster.workers:
        known = connected.get(worker.instance)
        if known is not None and known.draining:
            worker.renew()
        if known is None or known.draining:
            asked = worker_pb2.RegisterRequest(address=worker.address, instance=worker.instance, role=worker.role)
            registry.register(asked)
    heard = saboteur.instance in connected and connected[saboteur.instance].load.instance == saboteur.mark
    return heard and cluster.introduced()


@pytest.mark.parametrize("path", FIELDS, ids=[str(path) for path in FIELDS])
def test_any_value_of_a_field(router: Background, path: messages.Path) -> None:
    @messages.fuzz(3)
    @given(messages.values(path.field, plausible), st.sampled_from([PREFILL, DECODE]), st.sampled_from(MOMENTS))
    def one_field(value: Any, role: pb.WorkerRole.ValueType, moment: str) -> None:
        message = worker_pb2.WorkerMessage()
        path.put(message, value)
        sabotage(router, role, moment, [message])

    one_field()


@pytest.mark.parametrize("examples", [12, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
@pytest.mark.parametrize("role", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_any_messages(router: Background, role: pb.WorkerRole.ValueType, examples: int) -> None:
    @messages.fuzz(examples)
    @given(st.lists(messages.messages(MESSAGE, plausible), max_size=4), st.sampled_from(MOMENTS))
    def any_messages(words: list[worker_pb2.WorkerMessage], moment: str) -> None:
        sabotage(router, role, moment, words)

    any_messages()


@pytest.mark.parametrize("role", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_as_often_as_it_drains(router: Background, role: pb.WorkerRole.ValueType) -> None:
    draining = worker_pb2.WorkerMessage(ended=[worker_pb2.Ended(cause=worker_pb2.Ended.CAUSE_DRAINING)])
    for _ in range(3):
        sabotage(router, role, "asked", [draining])


def test_nothing_comes_after_the_last_token(router: Background) -> None:
    decode = router.cluster.decodes[0]
    assert isinstance(decode, Saboteur)
    step = worker_pb2.StepTokens(attempt_ids=[0] * 100, token_ids=[77] * 100)
    decode.words, decode.moment = [worker_pb2.WorkerMessage(tokens=step)], "running"
    (choice,) = router.stub.Generate(request(max_tokens=8), timeout=10).choices
    assert len(choice.token_ids) == choice.finish.usage.completion_tokens == 8
    router.assert_well()


HELLO = [path for path in messages.paths(MESSAGE) if path.names[0] == "hello"]


@pytest.mark.parametrize("path", HELLO, ids=[str(path) for path in HELLO])
def test_any_hello(router: Background, path: messages.Path) -> None:
    """Of a worker that comes besides those that are there, and goes again."""

    @messages.fuzz(2)
    @given(messages.values(path.field), st.sampled_from([PREFILL, DECODE]))
    def one_hello(value: Any, role: pb.WorkerRole.ValueType) -> None:
        stranger = FakeWorker(role, Script(step_seconds=0.001))
        message = worker_pb2.WorkerMessage(hello=stranger.hello)
        path.put(message, value)
        stranger.hello.CopyFrom(message.hello)
        registry = router.cluster.router.registry

        async def come() -> None:
            address = await stranger.start()
            registry.register(worker_pb2.RegisterRequest(address=address, instance=stranger.instance, role=role))
            link = registry._links[address, role]
            await eventually(lambda: link._stream is not None)
            deadline = time.monotonic() + 0.05  # by then it is connected, or refused
            await eventually(lambda: link.worker is not None or time.monotonic() > deadline)

        async def go() -> None:
            await stranger.die()
            key = (stranger.address, role)
            await eventually(lambda: registry._links[key].worker is None)
            registry._tasks.pop(key).cancel()
            del registry._links[key], registry._heard_of[key]

        router.run(come())
        try:
            assert outcome(router.stub.Generate, request(max_tokens=8)) in FINE
        finally:
            router.run(go())
        router.assert_well()

    one_hello()


ADDRESSES = ["1.2.3.4:x", "h:²", ":1", "unix:/no:1", "[::]:99999"]
REGISTER = list(messages.paths(worker_pb2.RegisterRequest.DESCRIPTOR))


@pytest.mark.parametrize("path", REGISTER, ids=[str(path) for path in REGISTER])
def test_any_registration(router: Background, path: messages.Path) -> None:
    register: Any = router.channel.unary_unary(
        "/twostroke.v1.Registry/Register", request_serializer=worker_pb2.RegisterRequest.SerializeToString
    )

    @messages.fuzz(6)
    @given(messages.values(path.field, lambda _: st.sampled_from(ADDRESSES)))
    def one_registration(value: Any) -> None:
        asked = worker_pb2.RegisterRequest(address="127.0.0.1:1", instance="nobody", role=DECODE)
        path.put(asked, value if not isinstance(value, str) or path.field.type == FieldDescriptor.TYPE_STRING else 1)
        assert outcome(register, asked) in {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}

    one_registration()
    router.assert_well()
