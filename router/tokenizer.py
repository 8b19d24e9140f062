"""Text and chats to token ids, and the way back."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tokenizers

from router import chat_template, token_bytes
from router.detokenizer import Detokenizer
from router.errors import InvalidArgument
from twostroke.v1 import inference_pb2 as pb

# Below this many characters tokenizing takes less than a millisecond, and a thread would only add to it.
INLINE_CHARACTERS = 2_000


class Tokenizer:
    """A model's `tokenizer.json` and chat template.

    Raises:
        UnsupportedTokenizer: its tokens cannot be turned into text one by one.
        FileNotFoundError: the directory has no tokenizer.json.
    """

    def __init__(self, directory: Path, vocab_size: int) -> None:
        file = directory / "tokenizer.json"
        if not file.exists():
            raise FileNotFoundError(f"{directory} has no tokenizer.json; the router needs the model's fast tokenizer")
        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._template = chat_template.load(directory)
        self._bytes = token_bytes.read(self._tokenizer, vocab_size)
        self._visible = self._bytes.without_special()
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenizer")

    @property
    def token_bytes(self) -> Sequence[bytes]:
        return self._bytes.table

    @property
    def special_ids(self) -> frozenset[int]:
        return self._bytes.special

    def decode(self, token_ids: Sequence[int], *, special_tokens: bool) -> str:
        detokenizer = self.detokenizer(special_tokens=special_tokens)
        return detokenizer.feed(token_ids) + detokenizer.finish()

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) <= INLINE_CHARACTERS:
            return self._encode(text, add_special_tokens)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._encode, text, add_special_tokens)

    async def encode_chat(self, chat: pb.Chat) -> list[int]:
        """
        Raises:
            InvalidArgument: the model has no chat template, or it refuses the messages.
        """
        if self._template is None:
            raise InvalidArgument("chat", "this model has no chat template; send text or token_ids")
        return await self.encode(self._template.render(chat), add_special_tokens=False)

    def detokenizer(self, *, special_tokens: bool) -> Detokenizer:
        table = self._bytes.table if special_tokens else self._visible
        return Detokenizer(table, self._bytes.strip_leading_space)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
