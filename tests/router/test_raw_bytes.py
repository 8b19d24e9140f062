"""What is no call at the router's port: garbage, other protocols, HTTP/2 that is cut short or garbled. Whatever it was,
the router goes on serving, and holds nothing for it."""

import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.server import MAX_STREAMS
from tests.damage import damaged
from tests.messages import fuzz
from tests.raw_calls import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    HEADERS,
    NO_UTF8,
    PING,
    PREFACE,
    PUSH,
    RESET,
    SETTINGS,
    WINDOW,
    call,
    frame,
    headers,
)
from tests.router.cluster import Background, background, request
from tests.router.fake_worker import Script

EXAMPLES = [40, pytest.param(2_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]


@pytest.fixture(scope="module")
def router(model: Path) -> Iterator[Background]:
    slow = [Script(step_seconds=0.001)]
    with background(model, prefills=slow, decodes=slow) as running:
        yield running


MESSAGE = request(max_tokens=2).SerializeToString()
BODY = b"\0" + struct.pack(">I", len(MESSAGE)) + MESSAGE


def send(router: Background, sent: bytes, answer: bool = False) -> bytes:
    """Sends all of it on a connection of its own; returns what came back soon, or until there was an answer."""
    host, _, port = router.cluster.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        try:
            connection.sendall(sent)
        except (BrokenPipeError, ConnectionResetError):
            return b""  # it was enough for the router
        connection.settimeout(5 if answer else 0.01)
        received = b""
        try:
            while b"grpc-status" not in received and (piece := connection.recv(65536)):
                received += piece
        except (TimeoutError, ConnectionResetError):
            pass
        return received


def test_a_call_made_of_bytes_is_answered(router: Background) -> None:
    """What the other tests damage is a call in the first place."""
    assert b"grpc-status" in send(router, call(BODY), answer=True)
    router.assert_well()


def test_a_connection_is_told_how_many_calls_it_may_have_at_once(router: Background) -> None:
    max_concurrent_streams = struct.pack(">HI", 3, MAX_STREAMS)  # RFC 9113, section 6.5.2
    assert max_concurrent_streams in send(router, call(BODY), answer=True)
    router.assert_well()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\0" * 10_000,
        b"\xff" * 10_000,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /twostroke.v1.Inference/Generate HTTP/1.1\r\nContent-Length: 4294967295\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500,  # TLS, where there is none
        b"SSH-2.0-x\r\n",
        PREFACE,
        PREFACE[:10],
        PREFACE + frame(SETTINGS, 0, 0, b"\0\4\xff\xff\xff\xff"),  # a window that is too large
        PREFACE + frame(SETTINGS, 0, 0, b"") + frame(SETTINGS, 0, 0, b"\0" * 5),
        PREFACE + frame(SETTINGS, 0, 0, b"") + frame(DATA, 0, 7, b"x" * 100),  # of no stream
        PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, END_HEADERS, 1, b"\xff" * 200),
        PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, 0, 1, b"") + frame(CONTINUATION, 0, 1, b"\0" * 999) * 50,
        PREFACE + frame(SETTINGS, 0, 0, b"") + frame(WINDOW, 0, 0, b"\0\0\0\0"),
        PREFACE + frame(SETTINGS, 0, 0, b"") + frame(PUSH, 0, 1, b"\0" * 20),
        PREFACE + frame(SETTINGS, 0, 0, b"") + frame(PING, 0, 0, b"12345678") * 1_000,
        PREFACE
        + frame(SETTINGS, 0, 0, b"")
        + (frame(HEADERS, END_HEADERS, 1, headers()) + frame(RESET, 0, 1, b"\0" * 4)),
        PREFACE + b"\xff\xff\xff" + bytes([DATA, 0]) + b"\0\0\0\1",  # a frame of 16 MiB that does not come
        call(b""),
        call(b"\0"),
        call(b"\0\xff\xff\xff\xff" + MESSAGE),  # a message of 4 GiB
        call(b"\1" + BODY[1:]),  # compressed, it says
        call(BODY + b"\0\0\0"),
        call(b"\0\0\0\0\3\xff\xff\xff"),
        call(BODY, path="/twostroke.v1.Inference/Nothing"),
        call(BODY, path=NO_UTF8),
    ],
    ids=range(27),
)
def test_what_is_no_call(router: Background, sent: bytes) -> None:
    send(router, sent)
    router.assert_well()


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_damaged_call(router: Background, examples: int) -> None:
    @fuzz(examples)
    @given(damaged(call(BODY)) | damaged(BODY).map(call) | st.binary(max_size=400))
    def damaged_call(sent: bytes) -> None:
        send(router, sent)

    damaged_call()
    router.assert_well()
