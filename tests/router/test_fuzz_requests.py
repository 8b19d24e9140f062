"""Every field of the public requests, with values that nobody should send: an answer or a code that says what is wrong,
within seconds; afterwards nothing is held, and the next request is answered."""

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given
from hypothesis import strategies as st

from router.errors import MAX_SENTENCE
from router.validate import MAX_MESSAGE_BYTES
from tests import messages
from tests.damage import JSON
from tests.router import models
from tests.router.cluster import Background, background, request
from tests.router.fake_worker import DECODE, PREFILL, FakeWorker, Script
from twostroke.v1 import inference_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"]
METHODS = {method.name: method for method in SERVICE.methods}
# GenerateStream takes what Generate takes, and so do the requests of GenerateMany; `test_any_message` has all three.
FIELDS = [
    (name, path)
    for name, method in METHODS.items()
    if name != "GenerateStream"
    for path in messages.paths(method.input_type)
    if not str(path).startswith("begin.request.")
]

SECONDS = 10


# Prints whatever a chat can have.
CHAT_TEMPLATE = "{{ messages | tojson }}{{ messages }}{{ messages[0].tool_calls }}{{ tools | tojson }}{{ x }}{{ name }}"


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Background]:
    """Its workers hold short sequences only, so that an answer as long as it can be is soon there."""
    model = models.write(tmp_path_factory.mktemp("model"), models.byte_level())
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    workers = [FakeWorker(role, Script(step_seconds=0.001), max_length=64) for role in (PREFILL, DECODE)]
    with background(model, prefills=workers[:1], decodes=workers[1:]) as running:
        yield running


def valid(method: str) -> Message:
    if method == "GenerateMany":
        return pb.GenerateManyRequest(begin=pb.GenerateManyRequest.Begin(request=request(max_tokens=4)))
    if method.startswith("Generate"):
        return request(max_tokens=4)
    return GetMessageClass(METHODS[method].input_type)()


def assert_answered(router: Background, method: str, message: bytes) -> None:
    """Answered, or told what is wrong with it; and that within seconds."""
    code, sentence = call(router, method, message)
    if len(message) > MAX_MESSAGE_BYTES:
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    elif code is not grpc.StatusCode.OK:
        assert code is grpc.StatusCode.INVALID_ARGUMENT, sentence
        assert 0 < len(sentence) <= MAX_SENTENCE


def call(router: Background, method: str, message: bytes) -> tuple[grpc.StatusCode, str]:
    """How the call ended: its code, and what it was told."""
    descriptor = METHODS[method]
    kind: Any = router.channel.unary_stream if descriptor.server_streaming else router.channel.unary_unary
    if descriptor.client_streaming:
        kind = router.channel.stream_stream
    answer_of = GetMessageClass(descriptor.output_type).FromString
    send: Any = kind(f"/{SERVICE.full_name}/{method}", response_deserializer=answer_of)
    try:
        answer = send(iter([message]) if descriptor.client_streaming else message, timeout=SECONDS)
        if descriptor.server_streaming:
            for _ in answer:
                pass
    except grpc.RpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


@pytest.mark.parametrize(("method", "path"), FIELDS, ids=[f"{method}-{path}" for method, path in FIELDS])
def test_any_value_of_a_field(router: Background, method: str, path: messages.Path) -> None:
    @messages.fuzz(6)
    @given(messages.values(path.field))
    def one_field(value: Any) -> None:
        message = valid(method)
        path.put(message, value)
        assert_answered(router, method, message.SerializeToString())

    one_field()
    router.assert_well()


def plausible(field: FieldDescriptor) -> st.SearchStrategy[Any] | None:
    """Values that pass the checks, so that more than one field at a time gets through them."""
    if field.type == FieldDescriptor.TYPE_FLOAT:
        return st.floats(0.015625, 1, width=32)
    if field.type == FieldDescriptor.TYPE_UINT32:
        return st.integers(1, 16)
    if field.name in ("template_variables", "tools", "arguments"):
        return st.builds(json.dumps, st.dictionaries(st.sampled_from(["x", "name", "tools"]), JSON, max_size=3))
    if field.type == FieldDescriptor.TYPE_STRING:
        return st.sampled_from(["user", "a", "the quick brown fox", "<|im_end|>"])
    return None


@pytest.mark.parametrize("examples", [20, pytest.param(1_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
@pytest.mark.parametrize("method", METHODS)
def test_any_message(router: Background, method: str, examples: int) -> None:
    @messages.fuzz(examples)
    @given(messages.messages(METHODS[method].input_type, plausible))
    def any_message(message: Message) -> None:
        assert_answered(router, method, message.SerializeToString())

    any_message()
    router.assert_well()


TEXTS = [(method, path) for method, path in FIELDS if path.field.type == FieldDescriptor.TYPE_STRING]


@pytest.mark.parametrize(("method", "path"), TEXTS, ids=[f"{method}-{path}" for method, path in TEXTS])
def test_text_that_is_no_utf8(router: Background, method: str, path: messages.Path) -> None:
    message = valid(method)
    path.put(message, ["mark"] if path.field.is_repeated else "mark")
    broken = message.SerializeToString().replace(b"mark", b"\xff\xfe\xc0\x80")
    before = refused(router, method)
    code, sentence = call(router, method, broken)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert sentence == f"what was sent is no message that /{SERVICE.full_name}/{method} takes"
    assert refused(router, method) == before + 1
    router.assert_well()


def refused(router: Background, method: str) -> float:
    """Calls, by the router's metrics."""
    labels = {"method": method, "code": "INVALID_ARGUMENT"}
    return router.cluster.router.metrics.registry.get_sample_value("twostroke_calls_total", labels) or 0


@pytest.mark.parametrize("method", METHODS)
def test_bytes_that_are_no_message(router: Background, method: str) -> None:
    whole = valid(method).SerializeToString() or b"\n\x01x"

    @messages.fuzz(15)
    @given(st.binary(max_size=60) | st.tuples(st.integers(0, len(whole) - 1), st.binary(max_size=4)))
    def garbled(how: bytes | tuple[int, bytes]) -> None:
        sent = how if isinstance(how, bytes) else whole[: how[0]] + how[1] + whole[how[0] + len(how[1]) + 1 :]
        assert_answered(router, method, sent)

    garbled()
    router.assert_well()


@pytest.mark.parametrize("over", [0, 1])
def test_the_largest_message_and_a_byte_more(router: Background, over: int) -> None:
    message = request(text="x" * (MAX_MESSAGE_BYTES - 100))
    message.text += "x" * (MAX_MESSAGE_BYTES + over - message.ByteSize())
    assert message.ByteSize() == MAX_MESSAGE_BYTES + over
    code, sentence = call(router, "Generate", message.SerializeToString())
    if over:
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    else:
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert sentence.startswith(f"input: the text has {len(message.text)} bytes; ")
    router.assert_well()
