"""Models that reason and call tools, each in its form, in clusters where they answer what they are told to."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from tests.router import models
from tests.router.cluster import Cluster, cluster
from tests.router.fake_worker import Script
from tests.router.templates import LLAMA, MISTRAL, MISTRAL_WITH_ARGS, QWEN, R1
from twostroke import AsyncClient, Message

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
QUESTION: Message = {"role": "user", "content": "How is it in Zürich?"}
END = "<|im_end|>"


@dataclass(frozen=True)
class Model:
    template: str
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()  # tokens of their own, but none that text goes without

    def write(self, directory: Path) -> Path:
        tokenizer = models.byte_level()
        tokenizer.add_special_tokens(list(self.special))
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in self.added])
        models.write(directory, tokenizer)
        (directory / "chat_template.jinja").write_text(self.template)
        return directory


LIKE_QWEN = Model(QWEN, added=("<think>", "</think>", "<tool_call>", "</tool_call>"))
LIKE_HERMES = Model(QWEN, special=("<tool_call>", "</tool_call>"))
LIKE_MISTRAL = Model(MISTRAL, special=("[TOOL_CALLS]",))
LIKE_NEW_MISTRAL = Model(MISTRAL_WITH_ARGS, special=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"))
LIKE_LLAMA = Model(LLAMA, special=("<|python_tag|>",))
LIKE_R1 = Model(R1, added=("<think>", "</think>"))


@asynccontextmanager
async def answering(
    directory: Path, model: Model, answer: str, **chat: Any
) -> AsyncIterator[tuple[Cluster, AsyncClient]]:
    """A cluster whose model answers this to QUESTION."""
    model.write(directory)
    tokens = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(answer + END).ids
    prompt = 0

    def token(length: int) -> int:
        return tokens[min(length - prompt, len(tokens) - 1)]

    async with (
        cluster(directory, prefills=[Script(token=token)], decodes=[Script(token=token)]) as it,
        AsyncClient(it.address) as client,
    ):
        prompt = len(await client.tokenize([QUESTION], **chat))
        yield it, client
