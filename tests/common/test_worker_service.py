"""A worker's gRPC side before an engine that takes nothing. Real gRPC on loopback, no model."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from common.network.peers import Peers
from common.probe import probe
from common.worker import message_size, unsent, worker_service
from common.worker.config import WorkerConfig
from common.worker.worker_peers import worker_peers
from common.worker.worker_service import MAX_REFUSALS, WorkerService
from router.cluster import worker_link
from tests.raw_calls import NO_UTF8, call
from twostroke.v1 import inference_pb2, worker_pb2, worker_pb2_grpc

LIMIT = 10
SENT = 500
HELLO = worker_pb2.RouterMessage(hello=worker_pb2.RouterHello(router="r")).SerializeToString()
PAYLOAD = b"x" * 100_000  # so that they do not fit into what gRPC itself holds


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerService]:
    monkeypatch.setattr(worker_service, "MAX_UNREAD_MESSAGES", LIMIT)
    config = WorkerConfig()
    hello = worker_pb2.WorkerHello(instance="worker", role=inference_pb2.WORKER_ROLE_DECODE)
    service = WorkerService(hello, config, worker_peers(config))
    yield service
    service.stop()


def test_what_has_stopped_leaves_no_event_loop_and_minds_no_late_signal(service: WorkerService) -> None:
    service.stop()
    assert service._loop.is_closed()
    service.set_serving(False)
    service.stop()


def test_whatever_keeps_it_from_serving_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def listen(*_: object) -> int:
        raise ValueError("what nobody thought of")

    monkeypatch.setattr(Peers, "listen", listen)
    with pytest.raises(ValueError, match="what nobody thought of"):
        WorkerService(worker_pb2.WorkerHello(), WorkerConfig(), worker_peers(WorkerConfig()))


@pytest.mark.parametrize("first", [None, worker_pb2.RouterMessage(), worker_pb2.RouterMessage(ended=[1])])
def test_a_stream_that_does_not_begin_with_hello_is_ended(
    service: WorkerService, first: worker_pb2.RouterMessage | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_service, "HELLO_SECONDS", 0.2)
    done = threading.Event()

    def messages() -> Iterator[worker_pb2.RouterMessage]:
        if first is not None:
            yield first
        done.wait(30)

    with grpc.insecure_channel(service.address) as channel:
        with pytest.raises(grpc.RpcError) as failed:
            next(worker_pb2_grpc.WorkerStub(channel).Connect(messages(), timeout=20))
        done.set()
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "must be hello" in (failed.value.details() or "")
    assert service.connections == ()


@pytest.mark.parametrize("first", [b"", HELLO], ids=["at first", "behind hello"])
def test_a_message_that_cannot_be_parsed_ends_the_stream_with_a_sentence(service: WorkerService, first: bytes) -> None:
    """Behind hello, the stream would else end as if the worker left in order."""
    done = threading.Event()

    def messages() -> Iterator[bytes]:
        if first:
            yield first
        yield b"\xff\xff\xff"
        done.wait(30)

    with grpc.insecure_channel(service.address) as channel:
        connect: Any = channel.stream_stream("/twostroke.v1.Worker/Connect")  # of bytes as they are
        with pytest.raises(grpc.RpcError) as failed:
            list(connect(messages(), timeout=20))
        done.set()
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "is no message" in (failed.value.details() or "")
    assert service.connections == ()


def test_a_router_is_held_up_while_the_engine_takes_nothing(service: WorkerService) -> None:
    handed_over = 0
    done = threading.Event()

    def messages() -> Iterator[worker_pb2.RouterMessage]:
        nonlocal handed_over
        yield worker_pb2.RouterMessage(hello=worker_pb2.RouterHello(router="r"))
        for number in range(SENT):
            handed_over = number + 1
            sequence = worker_pb2.Sequence(cache_root=PAYLOAD)
            yield worker_pb2.RouterMessage(prefills=[worker_pb2.Prefill(attempt_id=number, sequence=sequence)])
        done.wait(30)

    with grpc.insecure_channel(service.address) as channel:
        answers = worker_pb2_grpc.WorkerStub(channel).Connect(messages())
        next(answers)
        deadline = time.monotonic() + 30
        while service._inbox.qsize() < LIMIT:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        seen = -1
        while seen != handed_over:  # until no more is taken from us
            seen = handed_over
            time.sleep(0.3)
        assert 0 < handed_over < SENT
        assert service._inbox.qsize() == LIMIT
        received: list[int] = []
        while len(received) < SENT:
            for item in service.receive(timeout=5):
                assert item.message is not None
                received += [prefill.attempt_id for prefill in item.message.prefills]
        assert received == list(range(SENT))
        done.set()
        answers.cancel()
    while any(item.message is not None for item in service.receive(timeout=5)):
        pass
    assert service.connections == ()


def test_a_refusal_is_told_once_for_each_reason(service: WorkerService) -> None:
    """A router that refuses comes again every five seconds, and must not fill the log with that."""

    def connect(*messages: worker_pb2.RouterMessage) -> list[worker_pb2.RouterMessage]:
        """What the engine sees of a stream of these messages."""
        hello = worker_pb2.RouterMessage(hello=worker_pb2.RouterHello(router="r"))
        with grpc.insecure_channel(service.address) as channel:
            answers = worker_pb2_grpc.WorkerStub(channel).Connect(iter([hello, *messages]), timeout=10)
            assert next(answers).hello.instance == "worker"
            seen: list[worker_pb2.RouterMessage | None] = []
            while not seen or seen[-1] is not None:
                seen += [item.message for item in service.receive(timeout=5)]
            list(answers)
        return [message for message in seen if message]

    def refusal(reason: str) -> worker_pb2.RouterMessage:
        return worker_pb2.RouterMessage(refused=reason)

    with capture_logs() as logs:
        connect(*(refusal(str(number)) for number in range(MAX_REFUSALS + 1)), refusal("0"), refusal("0"))
        assert sum(map(len, service._refusals.values())) == 2
        assert connect(worker_pb2.RouterMessage(ended=[1]))
    assert [entry["reason"] for entry in logs if "reason" in entry][-2:] == [str(MAX_REFUSALS), "0"]

    nothing, work = worker_pb2.RouterMessage(), worker_pb2.RouterMessage(ended=[1])
    with capture_logs() as logs:
        for reason in ("its dtype is 'x'", "its dtype is 'x'", "its block_size is 3", "its dtype is 'x'"):
            assert connect(refusal(reason)) == [nothing]
        assert connect(work) == [nothing, work]
        assert connect(refusal("its dtype is 'x'")) == [nothing]
    assert [entry.get("reason", entry["event"]) for entry in logs] == [
        "router connected",
        "its dtype is 'x'",
        "router gone",
        "its block_size is 3",
        "router connected",
        "router gone",
        "router connected",
        "its dtype is 'x'",
        "router gone",
    ]
    assert {entry["log_level"] for entry in logs if "reason" in entry} == {"error"}


def test_a_call_whose_path_is_no_utf8_does_not_end_the_service(service: WorkerService) -> None:
    host, _, port = service.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(call(b"\0\0\0\0\0", path=NO_UTF8))
        assert connection.recv(1)
        time.sleep(0.1)
    hello = worker_pb2.RouterMessage(hello=worker_pb2.RouterHello(router="r"))
    with grpc.insecure_channel(service.address) as channel:
        answers = worker_pb2_grpc.WorkerStub(channel).Connect(iter([hello]), timeout=5)
        assert next(answers).hello.instance == "worker"
        answers.cancel()


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_whoever_reaches_the_port_cannot_fill_the_memory(service: WorkerService, compression: grpc.Compression) -> None:
    """Health asks for no secret. A message of a gigabyte would be held whole, and compressed it is a megabyte."""
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(service.address, options=options) as channel:
        check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
        with pytest.raises(grpc.RpcError) as failed:
            check(bytes(message_size.most_bytes(0) + 1), timeout=20, compression=compression)
        assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert probe(service.address, "") == f"{service.address}: NOT_SERVING"


def test_health_says_when_the_engine_hangs(service: WorkerService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_service, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(worker_service, "HEALTH_INTERVAL", 0.02)

    def eventually_serving(serving: bool, *, turns: bool) -> bool:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if (probe(service.address, "") is None) == serving:
                return True
            if turns:
                service.receive(timeout=0)
            time.sleep(0.01)
        return False

    assert probe(service.address, "") == f"{service.address}: NOT_SERVING"  # nobody has said that it is ready
    service.receive(timeout=0)
    service.set_serving(True)
    assert eventually_serving(True, turns=True)
    assert eventually_serving(False, turns=False)
    assert eventually_serving(True, turns=True)
    service.set_serving(False)
    assert eventually_serving(False, turns=True)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        service.receive(timeout=0)
        assert probe(service.address, "") is not None


def test_a_router_that_was_cut_off_is_told_so_when_it_reads_again(
    service: WorkerService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would else send requests to a worker that does not see it any more, until the silence strikes it."""
    monkeypatch.setattr(unsent, "MAX_UNSENT_MESSAGES", LIMIT)
    hello = worker_pb2.RouterMessage(hello=worker_pb2.RouterHello(router="r"))
    done = threading.Event()

    def messages() -> Iterator[worker_pb2.RouterMessage]:
        yield hello
        done.wait(30)

    with grpc.insecure_channel(service.address) as channel:
        answers = worker_pb2_grpc.WorkerStub(channel).Connect(messages(), timeout=20)
        next(answers)
        (connected,) = service.receive(timeout=5)
        while (received := service.receive(timeout=0)) == []:
            service.outgoing(connected.connection).cache.published = PAYLOAD
            service.flush()
        assert [(item.connection, item.message) for item in received] == [(connected.connection, None)]
        assert service.connections == ()
        with pytest.raises(grpc.RpcError) as error:
            list(answers)
        done.set()
    failed: Any = error.value  # of two classes that, as they are declared, cannot be one's bases
    assert isinstance(failed, grpc.Call)
    assert failed.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


STEPS, ROWS = 4_000, 8


def stream_of_steps(service: WorkerService, channel: grpc.Channel) -> tuple[Iterator[Any], threading.Event]:
    """Flushes the steps before the router reads the first of them. The event lets the router's side end."""
    done = threading.Event()

    def messages() -> Iterator[worker_pb2.RouterMessage]:
        yield worker_pb2.RouterMessage(hello=worker_pb2.RouterHello(router="r"))
        done.wait(30)

    answers = worker_pb2_grpc.WorkerStub(channel).Connect(messages(), timeout=60)
    next(answers)
    (connected,) = service.receive(timeout=5)
    for step in range(STEPS):
        tokens = service.outgoing(connected.connection).tokens
        tokens.attempt_ids.extend(range(ROWS))
        tokens.token_ids.extend([step] * ROWS)
        service.flush()
    return answers, done


def test_a_router_that_reads_late_gets_all_tokens_in_their_order_in_few_messages(service: WorkerService) -> None:
    """With a router's own channel: as gRPC is by itself, it would read more than half of them ahead, one by one."""
    with grpc.insecure_channel(service.address, options=worker_link.OPTIONS) as channel:
        answers, done = stream_of_steps(service, channel)
        received: list[int] = []
        count = 0
        while len(received) < STEPS * ROWS:
            received += next(answers).tokens.token_ids
            count += 1
        done.set()
    assert received == [step for step in range(STEPS) for _ in range(ROWS)]
    assert count < STEPS / 4


def test_a_worker_that_stops_lets_a_router_that_is_behind_read_the_rest(service: WorkerService) -> None:
    with grpc.insecure_channel(service.address, options=worker_link.OPTIONS) as channel:
        answers, done = stream_of_steps(service, channel)
        stopping = threading.Thread(target=service.stop)
        stopping.start()
        time.sleep(1)
        assert sum(len(message.tokens.token_ids) for message in answers) == STEPS * ROWS
        stopping.join(timeout=5)
        assert not stopping.is_alive()
        done.set()
