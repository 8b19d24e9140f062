"""The workload of nano-vLLM's bench.py, and asking a cluster for it."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.cluster import Flags
from twostroke import AsyncClient, event_loop

TEMPERATURE = 0.6
MAX_LENGTH = 4096
WARM_UP = 16  # of so many requests one is run before


@dataclass(frozen=True, slots=True)
class Ask:
    prompt: tuple[int, ...]
    output_tokens: int


def workload(requests: int, longest: int = 1024) -> list[Ask]:
    """nano-vLLM's bench.py: the same numbers from Python's generator, drawn in the same order."""
    draw = random.Random(0).randint
    prompts = [tuple(draw(0, 10_000) for _ in range(draw(100, longest))) for _ in range(requests)]
    return [Ask(prompt, draw(100, longest)) for prompt in prompts]


def does_both(worker: Flags, blocks: int, max_batch: int, max_batch_tokens: int) -> Flags:
    """Flags of a worker that prefills what it decodes, in chunks of a whole prefill batch: prompts go first, and
    nothing is handed over."""
    own = {"prefill-tokens": MAX_LENGTH, "prefill-chunk-tokens": max_batch_tokens}
    return {**worker, "num-blocks": blocks, "max-batch": max_batch, **own}


def timed_runs(
    generate: Callable[[list[list[int]], list[Any]], list[int]], settings_of: Callable[[int], Any], asks: Sequence[Ask]
) -> list[float]:
    """Seconds that another engine takes for `asks`, in two runs after a short one.

    Args:
        generate: answers the prompts, each with its settings. Returns how many tokens it made for each. Token ids of
            prompts are up to 2 above those of `asks`: they are others in each run, so that no prefix is in a cache.
        settings_of: what `generate` takes for an answer of so many tokens.

    Raises:
        AssertionError: an answer is not as long as it should be.
    """
    seconds = []
    for turn in range(3):
        some = asks[:: WARM_UP if turn == 0 else 1]
        prompts = [[token + turn for token in ask.prompt] for ask in some]
        settings = [settings_of(ask.output_tokens) for ask in some]
        began = time.perf_counter()
        made = generate(prompts, settings)
        if turn > 0:
            seconds.append(time.perf_counter() - began)
        assert made == [ask.output_tokens for ask in some]
    return seconds


def split(asks: Sequence[Ask], clients: int) -> list[list[Ask]]:
    """A share of `asks` for each client."""
    return [list(asks[first::clients]) for first in range(clients)]


def ask_all(pool: ProcessPoolExecutor, target: str, shares: Sequence[list[Ask]], salt: str, *, stream: bool) -> float:
    """Seconds until the router at `target` has answered everything, asked all at once, each share in a process of
    `pool`.

    Args:
        salt: of the prefix caches; a new one makes all prompts new.
        stream: by GenerateStream; else by Generate.

    Raises:
        AssertionError: an answer is not as long as it should be.
    """
    began = time.perf_counter()
    list(pool.map(partial(_ask_share, target, salt, stream), shares))
    return time.perf_counter() - began


def _ask_share(target: str, salt: str, stream: bool, asks: list[Ask]) -> None:
    event_loop.run(_ask_all(target, salt, stream, asks))


async def _ask_all(target: str, salt: str, stream: bool, asks: list[Ask]) -> None:
    async with AsyncClient(target, timeout=300) as client:
        counts = await asyncio.gather(*(_ask(client, salt, stream, ask) for ask in asks))
    assert counts == [ask.output_tokens for ask in asks]


async def _ask(client: AsyncClient, salt: str, stream: bool, ask: Ask) -> int:
    if not stream:
        answer = await client.generate(
            ask.prompt, max_tokens=ask.output_tokens, temperature=TEMPERATURE, ignore_eos=True, cache_salt=salt
        )
        return len(answer.token_ids)
    pieces = client.stream(
        ask.prompt, max_tokens=ask.output_tokens, temperature=TEMPERATURE, ignore_eos=True, cache_salt=salt
    )
    return sum([len(piece.token_ids) async for piece in pieces])
