"""The Python of the pages runs as it is printed, against a router whose workers say what a model might."""

import ast
import asyncio
import inspect
import itertools
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tokenizers import Tokenizer

from tests.router.answering import END, LIKE_QWEN
from tests.router.cluster import background
from tests.router.fake_worker import DECODE, PREFILL, FakeWorker, Script
from twostroke import Client, Piece, Unavailable

ROOT = Path(__file__).parents[2]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Aarau"}}\n</tool_call>'
ANSWERS = {  # to the first of these that is in the prompt
    "as JSON": '{"city": "Zürich", "people": 400000}',
    "in the north": "yes",
    "<tool_response>": "It rains.",
    "<tools>": CALL,
    "": "Red, blue and yellow.",
}


def samples(page: str) -> list[str]:
    found = PYTHON.findall((ROOT / page).read_text())
    assert found, page
    return found


def run(sample: str, names: dict[str, Any]) -> None:
    code = compile(sample, "sample", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if code.co_flags & inspect.CO_COROUTINE:
        asyncio.run(types.FunctionType(code, names)())
    else:
        exec(code, names)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = LIKE_QWEN.write(tmp_path_factory.mktemp("model"))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    def token(length: int) -> int:
        prompt = list(prefill.prefills[-1].sequence.token_ids)
        text = tokenizer.decode(prompt, skip_special_tokens=False)
        answer = next(answer for hint, answer in ANSWERS.items() if hint in text)
        return int(tokenizer.encode(answer + END).ids[length - len(prompt)])

    prefill, decode = FakeWorker(PREFILL, Script(token=token)), FakeWorker(DECODE, Script(token=token))
    with background(model, prefills=[prefill], decodes=[decode]) as running:
        yield running.cluster.address


class Breaking:
    """A client whose first streams break off, each after one piece more than the one before."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.seeds: list[int | None] = []

    def stream_chat(self, question: str, **options: Any) -> Iterator[Piece]:
        self.seeds.append(options.get("seed"))
        most = 5 * len(self.seeds) if len(self.seeds) < 3 else None
        yield from itertools.islice(self._client.stream_chat(question, **options), most)
        if most is not None:
            raise Unavailable("it broke off")


@pytest.mark.parametrize("page", ["README.md", "protos/README.md", "docs/api.md"])
def test_samples_run(page: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    printed: list[str] = []
    with Client(address, timeout=60) as client:
        names: dict[str, Any] = {"print": lambda *values, **_: printed.append(" ".join(map(str, values)))}
        for sample in samples(page):
            names["client"] = client
            if "event_loop.run(main())" in sample:
                names["main"] = lambda: asyncio.sleep(0)
            run(sample.replace("localhost:8600", address), names)
        if page == "docs/api.md":
            question = "Name three primary colors."
            assert names["ask"](question).text == ANSWERS[""]
            monkeypatch.setattr("time.sleep", lambda seconds: None)
            names["client"] = breaking = Breaking(client)
            assert "".join(names["ask_in_pieces"](question)) == ANSWERS[""]
            first, *others = breaking.seeds
            assert first is None
            assert None not in others
            assert len(set(others)) == 1
    shown = "".join(printed)
    assert ANSWERS[""] in shown
    assert (ANSWERS["<tool_response>"] in shown) == ("tools" in "".join(samples(page)))


GRPCURL = re.compile(r"-d '(.*?)'\s[^$]*?(\S+)/(\w+)$", re.MULTILINE | re.DOTALL)


def test_what_the_page_sends_by_grpcurl_is_answered(address: str) -> None:
    (section,) = re.findall(r"^## grpcurl\n(.*?)^## ", (ROOT / "docs/api.md").read_text(), re.MULTILINE | re.DOTALL)
    calls = GRPCURL.findall(section)
    assert len(calls) == section.count("-d '")
    with grpc.insecure_channel(address) as channel:
        reflected = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        for body, service, name in calls:
            method = reflected.FindServiceByName(service).methods_by_name[name]
            request, response = GetMessageClass(method.input_type)(), GetMessageClass(method.output_type)
            json_format.Parse(body, request)
            make: Any = channel.unary_stream if method.server_streaming else channel.unary_unary
            call = make(f"/{service}/{name}", type(request).SerializeToString, response.FromString)
            answer = call(request, timeout=60)
            assert all(part.ByteSize() for part in (answer if method.server_streaming else [answer]))
