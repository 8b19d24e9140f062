"""What a soak asks: questions drawn from a seed, and what a router must not take."""

import random
from dataclasses import dataclass
from typing import TypeAlias

from tests.e2e.tiny import CONTEXT_LENGTH, prompt
from twostroke.request import Options

PREFIX_TOKENS, PREFIXES = 256, 3


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    prompt: tuple[int, ...]
    options: Options
    kind: str  # for the counts


Answer: TypeAlias = tuple[tuple[str, tuple[int, ...], str], ...]
"""Text, tokens and reason of each choice: the same whenever the question is asked, sampled ones included."""

_TOKENS = tuple(prompt(20))

WRONG: tuple[tuple[tuple[int, ...], Options], ...] = (
    ((), {}),
    ((600,), {}),
    (_TOKENS, {"temperature": -1.0}),
    (_TOKENS, {"top_p": 2.0}),
    (_TOKENS, {"n": 0}),
    (_TOKENS, {"n": 17}),
    (_TOKENS, {"max_tokens": 0}),
    (_TOKENS, {"stop": ["x"] * 17}),
    (_TOKENS, {"cache_salt": "x" * 129}),
    (_TOKENS, {"regex": "("}),
    (_TOKENS, {"json_schema": {"type": "nonsense"}}),
    (_TOKENS, {"json_object": True, "ignore_eos": True}),
    (tuple(prompt(CONTEXT_LENGTH + 1)), {}),
)


_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 30}, "all": {"type": "array", "items": {"type": "integer"}}},
    "required": ["name", "all"],
}
GUIDES: tuple[Options, ...] = (
    {"json_schema": _SCHEMA},
    {"regex": "[a-z]{3,40}( [0-9]{1,6}){0,9}"},
    {"choices": ["the quick brown fox", "the lazy dog"]},
)


def draw(rng: random.Random) -> Question:
    kind = rng.choices(("short", "middle", "long", "shared prefix"), (40, 25, 10, 25))[0]
    tokens: tuple[int, ...]
    match kind:
        case "short":
            tokens = tuple(prompt(rng.randint(1, 40), seed=rng.randrange(1 << 16)))
        case "middle":
            tokens = tuple(prompt(rng.randint(40, 300), seed=rng.randrange(1 << 16)))
        case "long":
            tokens = tuple(prompt(rng.randint(400, 1_200), seed=rng.randrange(1 << 16)))
        case _:
            own = prompt(rng.randint(1, 60), seed=rng.randrange(1 << 16))
            tokens = (*prompt(PREFIX_TOKENS, seed=rng.randrange(PREFIXES)), *own)
    options: Options = {"max_tokens": rng.choice((1, 2, 10, 30, 60, 150)), "ignore_eos": rng.random() < 0.5}
    if rng.random() < 0.5:
        options["temperature"] = 0.0
    else:
        options["temperature"] = rng.uniform(0.3, 1.2)
        options["seed"] = rng.getrandbits(60)
        options["top_k"] = rng.choice((0, 40))
        options["top_p"] = rng.choice((1.0, 0.9))
    if rng.random() < 0.2:
        options["n"] = rng.randint(2, 4)
        options.setdefault("seed", rng.getrandbits(60))
    if rng.random() < 0.25:
        options["stop"] = rng.sample("abcdefghijklmnopqrstuvwxyz", 3)
    if rng.random() < 0.1:
        options["logprobs"] = 2
    if rng.random() < 0.15:
        options |= rng.choice(GUIDES) | {"ignore_eos": False}
    return Question(tokens, options, kind)
