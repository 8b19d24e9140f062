"""Streams of any number of threads, over one call to a router."""

import asyncio
import threading
from collections.abc import Sequence
from contextlib import aclosing
from typing import Self

from twostroke import AsyncClient, Piece
from twostroke.request import Options


class SharedStreams:
    """An event loop of its own, and on it a client whose streams share a call."""

    def __init__(self, target: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="shared streams", daemon=True)
        self._client = AsyncClient(target, share_call=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._client.close(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def pieces(self, prompt: Sequence[int], timeout: float, options: Options, most: int | None = None) -> list[Piece]:
        """All of an answer, or the first `most` pieces: then the request is cancelled."""
        return asyncio.run_coroutine_threadsafe(self._pieces(prompt, timeout, options, most), self._loop).result()

    async def _pieces(self, prompt: Sequence[int], timeout: float, options: Options, most: int | None) -> list[Piece]:
        pieces = []
        async with aclosing(self._client.stream(prompt, timeout=timeout, **options)) as stream:
            async for piece in stream:
                pieces.append(piece)
                if len(pieces) == most:
                    break
        return pieces
