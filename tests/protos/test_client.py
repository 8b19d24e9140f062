import json
import math
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import grpc
import pytest

import twostroke
from common.network.free_port import free_port
from router.validate import MAX_MESSAGE_BYTES
from tests.protos.fake_router import FakeRouter, serving
from twostroke import AsyncClient, Client, Message, Options, ToolCall
from twostroke.request import MAX_REQUEST_BYTES, chat_request, generate_request
from twostroke.v1 import inference_pb2 as pb


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    with serving(FakeRouter()) as router:
        yield router


@pytest.fixture
def client(router: FakeRouter) -> Iterator[Client]:
    with Client(router.address) as client:
        yield client


def test_generate(client: Client, router: FakeRouter) -> None:
    answer = client.generate("Hello", max_tokens=3)
    assert (answer.text, answer.token_ids) == ("t0 t1 t2 ", (0, 1, 2))
    assert answer.finish.reason == "length"
    assert answer.finish.usage.completion_tokens == 3
    assert answer.prompt.seed == 7
    assert router.requests == [pb.GenerateRequest(text="Hello", stopping=pb.Stopping(max_tokens=3))]


def test_stream(client: Client) -> None:
    pieces = list(client.stream("Hello", max_tokens=3, logprobs=0))
    assert "".join(piece.text for piece in pieces) == "t0 t1 t2 "
    assert [piece.prompt is not None for piece in pieces] == [True, False, False, False, False]
    assert [piece.finish is not None for piece in pieces] == [False, False, False, False, True]
    assert [logprob.token_id for piece in pieces for logprob in piece.logprobs] == [0, 1, 2]


@pytest.mark.parametrize(
    "target", ["http://localhost:8600", "localhost", "localhost:99999", "localhost:0", "", "::1:80"]
)
def test_a_target_that_grpc_would_take_for_another(target: str) -> None:
    for make in (Client, AsyncClient):
        with pytest.raises(twostroke.InvalidArgument, match=r"^target: '.*' is not host:port, such as localhost:8600"):
            make(target)


@pytest.mark.parametrize("target", ["[::1]:8600", "unix:/run/router", "dns:///router.example:8600"])
def test_targets_that_grpc_knows(target: str) -> None:
    Client(target).close()


def test_a_router_on_this_machine_is_not_called_through_a_proxy(
    router: FakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    port = router.address.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost"):
        with Client(f"{host}:{port}") as client:
            assert client.generate("Hello", max_tokens=1).text
    with Client(f"dns:///127.0.0.1:{port}") as client, pytest.raises(twostroke.Unavailable):
        client.generate("Hello")


def test_a_newer_router_may_have_other_reasons_to_finish(client: Client, router: FakeRouter) -> None:
    router.finish_reason = 99
    assert client.generate("Hello", max_tokens=1).finish.reason == "unknown"
    assert [piece.finish.reason for piece in client.stream("Hello", max_tokens=1) if piece.finish] == ["unknown"]


def test_several_choices(client: Client) -> None:
    answer = client.generate("Hello", n=2, max_tokens=1, logprobs=0)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "t0 "), (1, "t0 ")]
    assert [logprob.token_id for logprob in answer.logprobs] == [0]  # of the first, as is all but the choices
    assert [piece.index for piece in client.stream("Hello", n=2, max_tokens=1) if piece.finish] == [0, 1]


def test_every_option_reaches_its_field(client: Client, router: FakeRouter) -> None:
    client.generate(
        "Hello",
        temperature=0.0,
        top_k=3,
        top_p=0.5,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=1.0,
        logit_bias={5: -100.0},
        seed=2**64 - 1,
        max_tokens=1,
        min_tokens=1,
        stop=["a", "b"],
        stop_token_ids=(9,),
        include_stop=True,
        ignore_eos=True,
        n=1,
        logprobs=2,
        special_tokens=True,
        parsed=True,
        return_token_ids=False,
        request_id="r",
        cache_salt="s",
    )
    sampling = pb.Sampling(
        temperature=0.0,
        top_k=3,
        top_p=0.5,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=1.0,
        logit_bias={5: -100.0},
        seed=2**64 - 1,
    )
    stopping = pb.Stopping(
        max_tokens=1, min_tokens=1, stop=["a", "b"], stop_token_ids=[9], include_stop=True, ignore_eos=True
    )
    response = pb.ResponseOptions(token_ids=False, logprobs=2, special_tokens=True, parsed=True)
    assert router.requests == [
        pb.GenerateRequest(
            text="Hello",
            sampling=sampling,
            stopping=stopping,
            response=response,
            n=1,
            request_id="r",
            cache_salt="s",
        )
    ]
    assert router.requests[0].sampling.HasField("temperature")


def test_guides(client: Client, router: FakeRouter) -> None:
    schema = {"type": "object", "title": "ü"}
    client.generate("Hello", json_schema=schema)
    client.generate("Hello", json_schema='{"type": "object"}')
    client.generate("Hello", json_object=True)
    client.generate("Hello", regex="a+")
    client.generate("Hello", choices=("a", "b"))
    client.generate("Hello", choices=[])
    list(client.stream_chat("Hello", grammar="start: x"))
    assert [request.guide for request in router.requests] == [
        pb.Guide(json_schema='{"type": "object", "title": "ü"}'),
        pb.Guide(json_schema='{"type": "object"}'),
        pb.Guide(json_object=True),
        pb.Guide(regex="a+"),
        pb.Guide(choices=pb.Guide.Choices(texts=["a", "b"])),
        pb.Guide(choices=pb.Guide.Choices()),
        pb.Guide(grammar="start: x"),
    ]
    with pytest.raises(TypeError, match="regex and json_object are both guides; an answer follows one"):
        client.generate("Hello", json_object=True, regex="a")
    with pytest.raises(TypeError, match=r"^guide\.choices: must be a list, not str"):
        client.generate("Hello", choices="a")
    with pytest.raises(TypeError, match=r"^guide\.json_schema: .*not JSON serializable"):
        client.generate("Hello", json_schema={"a": object()})
    with pytest.raises(twostroke.InvalidArgument, match=r"^guide\.json_schema: Out of range"):
        client.generate("Hello", json_schema={"minimum": float("inf")})


def test_prompts(client: Client, router: FakeRouter) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")])
    client.generate([1, 2, 3])
    client.generate([{"role": "user", "content": "Hi"}])
    client.chat("Hi")
    list(client.stream_chat("Hi", stop="."))
    client.chat("Hi", add_generation_prompt=False)
    client.generate([])
    client.chat([])
    list(client.stream_chat([]))
    ids, *chats, last, empty, no_chat, no_stream = router.requests
    assert ids == pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2, 3]))
    assert [request.chat for request in chats] == [chat, chat, chat]
    assert chats[2].stopping.stop == ["."]
    assert last.chat.HasField("add_generation_prompt")
    assert not last.chat.add_generation_prompt
    assert empty.WhichOneof("input") == "token_ids"  # and not nothing: the router's answer names the field
    assert [request.WhichOneof("input") for request in (no_chat, no_stream)] == ["chat", "chat"]


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def test_tools_and_template_variables(client: Client, router: FakeRouter) -> None:
    messages: list[Message] = [
        {"role": "user", "content": "How is it?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "Hm.",
            "refusal": None,  # as other libraries' messages have it
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": {"b": "ü", "a": [2.0]}},
                },
                {"function": {"name": "weather", "arguments": '{"a":1}'}},
                {"id": None, "function": {"name": "weather"}},
            ],
        },
        {"role": "tool", "content": "", "tool_call_id": "1", "name": "weather"},
    ]
    variables = {"enable_thinking": False}
    client.chat(messages, tools=[TOOL], template_variables=variables)
    client.tokenize(messages, tools=[TOOL], template_variables=variables, add_generation_prompt=False)
    calls = [
        pb.ToolCall(id="1", name="weather", arguments='{"b": "ü", "a": [2.0]}'),
        pb.ToolCall(name="weather", arguments='{"a":1}'),
        pb.ToolCall(name="weather"),
    ]
    chat = pb.Chat(
        messages=[
            pb.ChatMessage(role="user", content="How is it?"),
            pb.ChatMessage(role="assistant", reasoning_content="Hm.", tool_calls=calls),
            pb.ChatMessage(role="tool", content="", tool_call_id="1", name="weather"),
        ],
        template_variables='{"enable_thinking": false}',
        tools=[json.dumps(TOOL)],
    )
    assert router.requests[0].chat == chat
    chat.add_generation_prompt = False
    assert router.tokenize_requests[0].chat == chat


def test_which_tools_are_called(client: Client, router: FakeRouter) -> None:
    for word in ("auto", "none", "required"):
        client.chat("Hello", tools=[TOOL], tool_choice=word)
    client.chat("Hello", tools=[TOOL], tool_choice={"type": "function", "function": {"name": "weather"}})
    client.chat("Hello", tools=[TOOL])
    assert [request.chat.tool_choice for request in router.requests] == [
        pb.ToolChoice(auto=True),
        pb.ToolChoice(none=True),
        pb.ToolChoice(required=True),
        pb.ToolChoice(name="weather"),
        pb.ToolChoice(),
    ]
    assert not router.requests[-1].chat.HasField("tool_choice")
    with pytest.raises(
        twostroke.InvalidArgument, match=r"^chat\.tool_choice: 'weather' is none of auto, none, required; "
    ):
        client.chat("Hello", tools=[TOOL], tool_choice="weather")


def test_where_there_are_tools_their_calls_are_read(client: Client, router: FakeRouter) -> None:
    client.chat("Hello", tools=[TOOL])
    client.generate([{"role": "user", "content": "Hello"}], tools=[TOOL])
    list(client.stream_chat("Hello", tools=[TOOL]))
    client.chat("Hello", parsed=True)
    client.generate("Hello", parsed=True)  # the router says what is wrong with it
    client.chat("Hello", tools=[TOOL], parsed=False)
    client.chat("Hello", tools=[TOOL], special_tokens=True)
    client.chat("Hello", tools=[])
    client.chat("Hello")
    assert [request.response.parsed for request in router.requests] == [True] * 5 + [False] * 4


def test_an_answer_goes_back_as_a_message(client: Client, router: FakeRouter) -> None:
    answer = client.chat("Hello", parsed=True, max_tokens=1, n=2)
    call = ToolCall("c1", "weather", {"place": "Zürich", "days": [1, 2.0]})
    assert (answer.text, answer.reasoning_content, answer.tool_calls) == ("t0 ", "Hm.", (call,))
    assert answer.message() == answer.choices[1].message()
    client.chat([{"role": "user", "content": "Hello"}, answer.message()])
    assert router.requests[-1].chat.messages[1] == pb.ChatMessage(
        role="assistant",
        content="t0 ",
        reasoning_content="Hm.",
        tool_calls=[pb.ToolCall(id="c1", name="weather", arguments='{"place": "Zürich", "days": [1, 2.0]}')],
    )
    pieces = list(client.stream_chat("Hello", parsed=True, max_tokens=2))
    assert [(piece.reasoning_content, piece.tool_calls) for piece in pieces[1:3]] == [("Hm.", (call,)), ("", ())]

    plain = client.chat("Hello", max_tokens=1)
    assert (plain.reasoning_content, plain.tool_calls) == ("", ())
    assert plain.message() == {"role": "assistant", "content": "t0 "}
    only_calls = replace(answer.choices[0], text="", reasoning_content="")
    assert only_calls.message().keys() == {"role", "tool_calls"}  # templates ask for content beside calls
    assert replace(only_calls, tool_calls=()).message() == {"role": "assistant", "content": ""}


@pytest.mark.parametrize("call", ["weather", {"name": "weather"}, {"type": "custom", "function": {"name": "weather"}}])
def test_what_is_no_tool_call(client: Client, call: object) -> None:
    messages: list[Message] = [{"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(TypeError, match="a tool call is "):
        client.chat(messages)


def test_what_is_no_prompt_is_named(client: Client, router: FakeRouter) -> None:
    parts: list[Message] = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    with pytest.raises(TypeError, match=r"^chat\.messages\[0\]\.content: must be text, not list"):
        client.chat(parts)
    nothing: Any = None
    with pytest.raises(TypeError, match="a prompt is text, messages of a chat or a list of token ids, not NoneType"):
        client.generate(nothing)
    octets: Any = b"abc"  # for protobuf, a list of numbers as well as text
    with pytest.raises(TypeError, match="a prompt is text, messages of a chat or a list of token ids, not bytes"):
        client.generate(octets)
    for call in (client.chat, client.stream_chat, client.tokenize):
        with pytest.raises(TypeError, match=r"^chat\.messages: must be a list, not bytes"):
            call(octets)
    with pytest.raises(TypeError, match=r"^token_ids: must be a list, not bytes"):
        client.detokenize(octets)
    ids: Any = [1, 2]  # a prompt, but no chat
    for call in (client.chat, client.stream_chat, client.tokenize):
        with pytest.raises(TypeError, match=r"^chat\.messages\[0\]: must be a dictionary, not int"):
            call(ids)
    assert router.requests == []
    assert router.tokenize_requests == []


def test_wrong_options_are_refused_before_the_call(client: Client, router: FakeRouter) -> None:
    misspelt: Any = {"temprature": 1.0}
    with pytest.raises(TypeError, match="'temprature' is no option"):
        client.stream("Hello", **misspelt)
    mistyped: Any = {"top_k": "many"}
    with pytest.raises(TypeError, match="top_k"):
        client.stream("Hello", **mistyped)
    with pytest.raises(TypeError, match="chat messages only"):
        client.stream("Hello", add_generation_prompt=True)
    with pytest.raises(TypeError, match="tools is for chat messages only"):
        client.tokenize("Hello", tools=[TOOL])
    with pytest.raises(TypeError, match="'temprature' is no option"):
        client.tokenize("Hello", **misspelt)
    with pytest.raises(TypeError, match=r"^chat\.tools\[0\]: .*set is not JSON serializable"):
        client.stream_chat("Hello", tools=[{"name": {1}}])
    with pytest.raises(twostroke.InvalidArgument, match=r"^chat\.template_variables: .*JSON"):
        client.chat("Hello", template_variables={"x": float("nan")})
    with pytest.raises(twostroke.InvalidArgument, match=r"^chat\.messages\[0\]: 'colour' is no key of a message"):
        client.tokenize([{"role": "user", "colour": "red"}])
    with pytest.raises(twostroke.InvalidArgument, match=r"^token_ids\.ids\[1\]: -2 is not within \[0, 4294967295\]$"):
        client.stream([1, -2])
    with pytest.raises(twostroke.InvalidArgument, match=r"^token_ids\[0\]: -1 is not within \[0, 4294967295\]$"):
        client.detokenize([-1])
    assert router.requests == []
    assert router.tokenize_requests == []


UINT32, UINT64 = "[0, 4294967295]", "[0, 18446744073709551615]"


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"n": -1}, f"n: -1 is not within {UINT32}"),
        ({"max_tokens": -1}, f"stopping.max_tokens: -1 is not within {UINT32}"),
        ({"top_k": -1}, f"sampling.top_k: -1 is not within {UINT32}"),
        ({"seed": -1}, f"sampling.seed: -1 is not within {UINT64}"),
        ({"seed": 2**64}, f"sampling.seed: {2**64} is not within {UINT64}"),
        ({"logprobs": 2**32}, f"response.logprobs: {2**32} is not within {UINT32}"),
        ({"logit_bias": {-1: 1}}, f"sampling.logit_bias: -1 is not within {UINT32}"),
        ({"stop_token_ids": [1, -1]}, f"stopping.stop_token_ids[1]: -1 is not within {UINT32}"),
        ({"temperature": 10**309}, f"sampling.temperature: {10**309} is not within [-3.4e38, 3.4e38]"),
        ({"stop": ["a", "b\ud800"]}, "stopping.stop[1]: character 1 is the surrogate '\\ud800', not in UTF-8"),
        ({"request_id": "\udfff"}, "request_id: character 0 is the surrogate '\\udfff', not in UTF-8"),
        ({"json_schema": {"a": "\ud800"}}, "guide.json_schema: character 7 is the surrogate '\\ud800', not in UTF-8"),
    ],
)
def test_a_value_that_does_not_fit_its_field(options: dict[str, Any], refusal: str) -> None:
    with pytest.raises(twostroke.InvalidArgument) as refused:
        generate_request("Hello", cast(Options, options))
    assert refused.value.message == refusal
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"json_schema": [1]}, "guide.json_schema: must be a dictionary or JSON, not list"),
        ({"json_schema": b"{}"}, "guide.json_schema: must be a dictionary or JSON, not bytes"),
        ({"regex": b"a"}, "guide.regex: must be text, not bytes"),
        ({"choices": ["a", 5]}, "guide.choices[1]: must be text, not int"),
        ({"stop": b"a"}, "stopping.stop: must be a list, not bytes"),
        ({"stop_token_ids": b"a"}, "stopping.stop_token_ids: must be a list, not bytes"),
        ({"stop_token_ids": 5}, "stopping.stop_token_ids: must be a list, not int"),
        ({"stop_token_ids": {5: 1}}, "stopping.stop_token_ids: must be a list, not dict"),
        ({"logit_bias": [5]}, "sampling.logit_bias: must be a dictionary, not list"),
        ({"logit_bias": {5: "a"}}, "sampling.logit_bias[5]: must be a number, not str"),
        ({"top_k": [1]}, "sampling.top_k: must be a whole number, not list"),
        ({"temperature": None}, "sampling.temperature: must be a number, not NoneType"),
        ({"ignore_eos": "no"}, "stopping.ignore_eos: must be true or false, not str"),
        ({"return_token_ids": "no"}, "response.token_ids: must be true or false, not str"),
        ({"tools": TOOL}, "chat.tools: must be a list, not dict"),
        ({"tools": ["{}"]}, "chat.tools[0]: must be a dictionary, not str"),
        ({"tool_choice": True}, "chat.tool_choice: must be text or a dictionary, not bool"),
        (
            {"tool_choice": {"name": "weather"}},
            "chat.tool_choice: one tool is {'type': 'function', 'function': {'name': ...}}",
        ),
        ({"tool_choice": {"function": {"name": 5}}}, "chat.tool_choice.name: must be text, not int"),
        ({"template_variables": "{}"}, "chat.template_variables: must be a dictionary, not str"),
    ],
)
def test_a_value_of_the_wrong_type(options: dict[str, Any], refusal: str) -> None:
    with pytest.raises(TypeError) as refused:
        chat_request("Hello", cast(Options, options))
    assert str(refused.value) == refusal


def test_text_that_has_no_utf_8(client: Client, router: FakeRouter) -> None:
    text = "a\ud83d"
    for call in (client.generate, client.tokenize):
        with pytest.raises(twostroke.InvalidArgument, match=r"^text: character 1 is the surrogate '\\ud83d'"):
            call(text)
    with pytest.raises(twostroke.InvalidArgument, match=r"^chat\.messages\[0\]\.content: character 1 is the surrogate"):
        client.chat(text)
    function = {"name": "weather", "arguments": text}
    messages: list[Message] = [{"role": "user"}, {"role": "assistant", "tool_calls": [{"function": function}]}]
    with pytest.raises(twostroke.InvalidArgument, match=r"^chat\.messages\[1\]\.tool_calls\[0\]\.arguments: "):
        client.tokenize(messages)
    assert router.requests == []
    assert router.tokenize_requests == []


def test_dictionaries_of_other_kinds() -> None:
    """The types of the options say Mapping, and a type checker lets them through."""
    inner = MappingProxyType({"type": "string"})
    schema = MappingProxyType({"type": "object", "properties": {"place": inner}})
    wanted = '{"type": "object", "properties": {"place": {"type": "string"}}}'
    assert generate_request("Hello", {"json_schema": schema}).guide.json_schema == wanted
    asked = chat_request("Hello", {"tools": [schema], "template_variables": MappingProxyType({"x": inner})}).chat
    assert (list(asked.tools), asked.template_variables) == ([wanted], '{"x": {"type": "string"}}')


def test_json_without_an_end(client: Client) -> None:
    own: dict[str, object] = {}
    own["own"] = own
    with pytest.raises(twostroke.InvalidArgument, match=r"^guide\.json_schema: Circular"):
        client.generate("Hello", json_schema=own)


def test_a_request_that_no_router_takes(client: Client, router: FakeRouter) -> None:
    """gRPC would refuse it with the code of a router that is overloaded: worth trying again, of all things."""
    router.longest = MAX_REQUEST_BYTES
    overhead = len("\x12\0\0\0\0")  # of the text's field: its number, and its length in four bytes
    client.generate("x" * (MAX_REQUEST_BYTES - overhead), timeout=30)
    assert router.requests[0].ByteSize() == MAX_REQUEST_BYTES == MAX_MESSAGE_BYTES
    text = "x" * (MAX_REQUEST_BYTES - overhead + 1)
    refusal = "^request: has 4194305 bytes; at most 4194304 are allowed$"
    call: Callable[[str], object]
    for call in (client.generate, client.stream):
        with pytest.raises(twostroke.InvalidArgument, match=refusal):
            call(text)
    for call in (client.chat, client.stream_chat, client.tokenize):
        with pytest.raises(twostroke.InvalidArgument, match=r"^request: has "):
            call(text)
    with pytest.raises(twostroke.InvalidArgument, match=r"^request: has "):
        client.detokenize(range(1 << 21))
    assert len(router.requests) == 1
    assert router.tokenize_requests == []


def test_tokens(client: Client, router: FakeRouter) -> None:
    assert client.tokenize("Hi") == (72, 105)
    assert client.tokenize([{"role": "user", "content": "Hi"}], add_special_tokens=False) == (72, 105)
    assert router.tokenize_requests[1].HasField("chat")
    assert not router.tokenize_requests[1].add_special_tokens
    assert client.detokenize([72, 105]) == "Hi"


def test_no_answer_is_too_large(client: Client, router: FakeRouter) -> None:
    """The work has been done, and the same request would be answered no otherwise."""
    reason = "x" * ((64 << 20) + 1)
    router.load = pb.GetLoadResponse(problems=[pb.WorkerProblem(reason=reason)])
    assert client.load().problems[0].reason == reason


def test_model_and_load(client: Client) -> None:
    assert client.model().name == "fake"
    assert client.load().running == 0


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("INVALID_ARGUMENT", twostroke.InvalidArgument),
        ("RESOURCE_EXHAUSTED", twostroke.Overloaded),
        ("UNAVAILABLE", twostroke.Unavailable),
        ("DEADLINE_EXCEEDED", twostroke.DeadlineExceeded),
        ("UNAUTHENTICATED", twostroke.Unauthenticated),
        ("INTERNAL", twostroke.TwostrokeError),
    ],
)
def test_errors(client: Client, code: str, error: type[twostroke.TwostrokeError]) -> None:
    for call in (client.generate, lambda prompt: list(client.stream(prompt))):
        with pytest.raises(twostroke.TwostrokeError, match="as you asked") as caught:
            call(f"fail {code}")
        assert type(caught.value) is error
        assert caught.value.code is grpc.StatusCode[code]
        assert caught.value.message == "as you asked"


def test_a_call_that_a_stopping_router_cancels_is_safe_to_retry(client: Client) -> None:
    for call in (client.generate, lambda prompt: list(client.stream(prompt))):
        with pytest.raises(twostroke.Unavailable, match="shut down") as caught:
            call("fail CANCELLED")
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE


def test_a_client_that_is_closed_during_a_call_does_not_blame_the_router(router: FakeRouter) -> None:
    router.step_seconds = 10
    client = Client(router.address)
    threading.Timer(0.3, client.close).start()
    with pytest.raises(twostroke.TwostrokeError, match=r"^the client was closed before the call ended$") as caught:
        list(client.stream("Hello"))
    assert caught.value.code is grpc.StatusCode.CANCELLED
    assert not isinstance(caught.value, twostroke.Unavailable)


def test_a_client_that_is_closed_says_so(router: FakeRouter) -> None:
    client = Client(router.address)
    client.model()
    stream = client.stream("Hello")
    client.close()
    calls: tuple[Callable[[], object], ...] = (client.model, lambda: next(stream), client.wait_until_ready)
    for call in calls:
        with pytest.raises(twostroke.TwostrokeError, match=r"^the client is closed; further calls need a new one$"):
            call()
    client.close()


def test_no_router() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(twostroke.Unavailable):
        client.model()


def test_timeouts(router: FakeRouter) -> None:
    router.step_seconds = 10
    with Client(router.address, timeout=60) as client:
        passed = r"^the call did not end within its timeout of 0\.05 s$"
        with pytest.raises(twostroke.DeadlineExceeded, match=passed):
            client.generate("Hello", timeout=0.05)
        with pytest.raises(twostroke.DeadlineExceeded, match=passed):
            list(client.stream("Hello", timeout=0.05))
        with pytest.raises(twostroke.DeadlineExceeded, match=r"^as you asked$"):  # a deadline that is not this call's
            client.generate("fail DEADLINE_EXCEEDED")
        router.step_seconds = 0
        client.generate("Hello", timeout=math.inf)
        client.generate("Hello")
    assert router.deadlines[-2] is None
    assert router.deadlines[-1] is not None
    assert router.deadlines[-1] == pytest.approx(60, abs=5)


def test_leaving_the_loop_cancels(client: Client, router: FakeRouter) -> None:
    router.step_seconds = 0.01
    for piece in client.stream("Hello", max_tokens=10_000):
        if piece.text:
            break
    assert router.cancelled.wait(timeout=20)


def test_api_key(router: FakeRouter) -> None:
    router.api_key = "secret"
    with Client(router.address, api_key="secret") as client:
        assert client.generate("Hello").text
    with Client(router.address, api_key="wrong") as client, pytest.raises(twostroke.Unauthenticated):
        client.generate("Hello")


@pytest.mark.parametrize("make", [Client, AsyncClient])
def test_what_a_client_cannot_be_made_with(make: type[Client | AsyncClient]) -> None:
    """gRPC would call it an internal error, as if the router were at fault."""
    for key, character in (("alice.k\n", r"7 is '\\n'"), ("alicé.k", "4 is 'é'")):
        with pytest.raises(twostroke.InvalidArgument, match=rf"^api_key: character {character}; only printable ASCII"):
            make(api_key=key)
    with pytest.raises(twostroke.InvalidArgument, match=r"^tls_server_name: goes with tls only"):
        make(tls_server_name="router.example")
    for argument, value in (("tls", "ca.pem"), ("tls", Path("ca.pem")), ("tls_server_name", 5), ("timeout", "5")):
        wrong: Any = {argument: value}
        with pytest.raises(TypeError, match=f"^{argument}: must be .*, not {type(value).__name__}"):
            make(**wrong)
    with pytest.raises(TypeError, match=r"^api_key: must be text, not bytes$"):
        make(api_key=cast(Any, b"alice.k"))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        str(key),
        "-out",
        str(certificate),
    ]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(command, check=True, capture_output=True)
    tls = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    with serving(FakeRouter(api_key="secret"), listen="localhost:0", tls=tls) as router:
        target = router.address.replace("127.0.0.1", "localhost")
        trusted = grpc.ssl_channel_credentials(certificate.read_bytes())
        with Client(target, tls=trusted, api_key="secret") as client:
            assert client.generate("Hello").text
        with Client(target, tls=True) as client, pytest.raises(twostroke.Unavailable):
            client.generate("Hello")  # no authority of the system's vouches for this certificate


def test_a_target_or_timeout_of_another_type_is_named(client: Client) -> None:
    wrong: Any = "3"
    for call in (lambda: client.model(timeout=wrong), lambda: client.wait_until_ready(timeout=wrong)):
        with pytest.raises(TypeError, match=r"^timeout: must be a number of seconds, not str$"):
            call()
    with pytest.raises(TypeError, match=r"^target: must be text, not int$"):
        Client(cast(Any, 8600))


def test_wait_until_ready() -> None:
    ready = threading.Event()
    with serving(FakeRouter(), ready=ready) as router, Client(router.address) as client:
        with pytest.raises(twostroke.DeadlineExceeded, match=r"was not ready within 1 s: it has no workers that"):
            client.wait_until_ready(timeout=1)
        ready.set()
        client.wait_until_ready(timeout=10)
        client.wait_until_ready(timeout=math.inf)


def test_waiting_for_a_router_that_is_not_there() -> None:
    refused = r"^127\.0\.0\.1:1 was not ready within 1 s: failed to connect .* Connection refused$"
    with Client("127.0.0.1:1") as client, pytest.raises(twostroke.DeadlineExceeded, match=refused):
        client.wait_until_ready(timeout=1)


def test_several_routers_take_turns_and_one_that_is_gone_is_left_out() -> None:
    with serving(FakeRouter()) as first, ExitStack() as running:
        second = running.enter_context(serving(FakeRouter()))
        ports = [router.address.rpartition(":")[2] for router in (first, second)]
        with Client(f"ipv4:{','.join(f'127.0.0.1:{port}' for port in ports)}") as both:
            while not (first.requests and second.requests):  # one connection comes a moment after the other
                both.generate("Hello", max_tokens=1)
            before = len(first.requests), len(second.requests)
            for _ in range(10):
                both.generate("Hello", max_tokens=1)
            assert (len(first.requests), len(second.requests)) == (before[0] + 5, before[1] + 5)
            running.close()
            answered = 0
            while answered < 10:
                try:
                    both.generate("Hello", max_tokens=1)
                    answered += 1
                except twostroke.Unavailable:  # it has not heard yet that the second one is gone
                    answered = 0


def test_a_router_that_comes_while_it_is_waited_for() -> None:
    address = f"127.0.0.1:{free_port()}"
    with Client(address) as client, ThreadPoolExecutor() as threads:
        waiting = threads.submit(client.wait_until_ready, timeout=20)
        time.sleep(0.5)
        assert not waiting.done()
        with serving(FakeRouter(), listen=address):
            waiting.result(timeout=20)
