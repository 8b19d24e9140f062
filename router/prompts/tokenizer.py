"""Tokenizes text and chats, and makes text of tokens."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar, cast

import tokenizers

from common.model import vocabulary
from common.model.model_config import ModelConfig
from common.model.model_error import ModelError
from router.callers.fair_threads import FairThreads
from router.callers.limits import CALLER
from router.callers.waiting_bytes import WaitingBytes
from router.errors import InvalidArgument
from router.prompts import chat_template, template_input
from router.vocabulary import answer_format, token_bytes
from router.vocabulary.answer_format import AnswerFormat
from router.vocabulary.detokenizer import NO_SIGNS, Detokenizer
from twostroke.v1 import inference_pb2 as pb

T = TypeVar("T")

# Text of at most so many bytes is tokenized on the event loop: that takes less than a millisecond.
INLINE_BYTES = 2_000

# One caller can occupy two of them. Tokenizing takes about ten times a text's size in memory.
THREADS = 3


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A prompt's tokens, and what the parser of an answer needs to know about the prompt."""

    token_ids: list[int]
    form: AnswerFormat = field(default_factory=AnswerFormat)  # how the answer marks reasoning and calls
    opens_reasoning: bool = False  # the answer begins inside reasoning
    closes_reasoning: bool = False  # the answer begins after reasoning
    tools: frozenset[str] = frozenset()  # names of the tools that the model may call


class Tokenizer:
    """A model's `tokenizer.json` and chat template.

    Raises:
        ModelError: a file is missing or damaged, or the tokenizer's decoder is not supported.
    """

    def __init__(self, directory: Path, model: ModelConfig) -> None:
        file = directory / "tokenizer.json"
        if not file.exists():
            raise ModelError(f"{directory} has no tokenizer.json; the router needs the model's fast tokenizer")
        self._tokenizer = _read(file)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocabulary = vocabulary.digest(directory)
        self._template = chat_template.load(directory)
        self.token_bytes = token_bytes.read(self._tokenizer, model.vocab_size)
        self._visible = self.token_bytes.without_special()
        self.answer_format = answer_format.of(
            "" if self._template is None else self._template.source,
            self._tokenizer.token_to_id,
            self.token_bytes.special,
        )
        self._context_length = model.context_length
        # A longer text has too many tokens for the context in any case, and may take seconds per megabyte to tokenize.
        self._most_bytes = model.context_length * max(map(len, self.token_bytes.table))
        self._waiting = WaitingBytes("too much text waits to be made into tokens")
        self._threads = FairThreads(THREADS, "tokenizer")

    def decode(self, token_ids: Sequence[int], *, special_tokens: bool) -> str:
        detokenizer = self.detokenizer(special_tokens=special_tokens)
        return detokenizer.feed(token_ids) + detokenizer.finish()

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """
        Raises:
            InvalidArgument: the text has more bytes than any that fits the model's context.
            Exhausted: too much text waits already.
        """
        size = len(text.encode())
        self._check_size(size)
        return await self._on_a_thread(size, lambda: self._encode(text, add_special_tokens))

    async def encode_chat(self, chat: pb.Chat) -> Tokenized:
        """The chat's sizes must have been checked: see `template_input.check_sizes`.

        Raises:
            InvalidArgument: the model has no chat template, or that refuses the chat, or the chat has more bytes than
                any that fits the model's context.
            Exhausted: too much text waits already.
        """
        template = self._template
        if template is None:
            raise InvalidArgument("chat", "this model has no chat template; send text or token_ids")

        def render() -> tuple[str, frozenset[str]]:
            return template.render(chat, self._most_bytes), template_input.tool_names(chat)

        size = chat.ByteSize()
        self._check_size(size)
        text, tools = await self._on_a_thread(size, render)
        token_ids = await self.encode(text, add_special_tokens=False)  # it may be much longer than the chat
        form = replace(self.answer_format, calls=None) if chat.tool_choice.none else self.answer_format
        return Tokenized(token_ids, form, form.opens_reasoning(text), form.closes_reasoning(text), tools)

    def detokenizer(
        self, *, special_tokens: bool, begins_text: bool = True, signs: Mapping[int, str] = NO_SIGNS
    ) -> Detokenizer:
        """
        Args:
            special_tokens: their text is kept.
            begins_text: the tokens do not continue another text. Then the space is dropped with which some tokenizers
                begin every text.
            signs: what stands for some of the special tokens.
        """
        known = self.token_bytes
        return Detokenizer(
            known.table if special_tokens else self._visible,
            known.strip_leading_space and begins_text,
            known.opening if begins_text else None,
            signs,
        )

    def spells(self, token_ids: Sequence[int]) -> bool:
        """Whether the tokens have any text, special tokens aside."""
        return any(self._visible[token] for token in token_ids)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # As a batch, which releases the GIL; `encode` does not.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def _check_size(self, size: int) -> None:
        if size > self._most_bytes:
            raise InvalidArgument(
                "input",
                f"the text has {size} bytes; the model's context of {self._context_length} tokens has room for no more "
                f"than {self._most_bytes}",
            )

    async def _on_a_thread(self, size: int, work: Callable[[], T]) -> T:
        if size <= INLINE_BYTES:
            return work()
        caller = CALLER.get().name
        self._waiting.add(caller, size)
        wanted = True
        working = self._threads.submit(caller, lambda: work() if wanted else None)
        working.add_done_callback(lambda _: self._waiting.remove(caller, size))
        try:
            # Shielded: if the caller leaves, its text is kept, and counted, until a thread has come to it.
            return cast(T, await asyncio.shield(working))
        finally:
            wanted = False


def _read(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        raise ModelError(f"{file} is no tokenizer: {error}") from error
