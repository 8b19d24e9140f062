"""What callers ask: prompts with shared beginnings, of lengths around the edges of blocks, and all that can be wished
of the answer."""

import random
from collections.abc import Iterator

from llguidance import LLMatcher

from router.dispatch.request import Prompt, Request
from router.mailbox import Mailbox
from router.turnstile import Turnstile
from tests.router.models import EOS, VOCAB_SIZE
from tests.simulation.setting import MAX_LENGTH
from twostroke.v1 import worker_pb2 as pb

_GRAMMARS = (
    LLMatcher.grammar_from_regex("[a-f]{3,6}-[0-9]{2}"),
    LLMatcher.grammar_from_lark('start: "the quick brown fox" | "the lazy dog"'),
)
_TEXTS = 4
_LENGTHS = (1, 3, 4, 5, 7, 8, 9, 12, 16, 20, 31, 32, 40, 62)


def draw(rng: random.Random, serials: Iterator[int], *, plain: bool) -> list[Request]:
    """The choices of one call, `plain` with neither penalties, biases, log-probabilities nor grammars."""
    prompt, most_tokens = _prompt(rng, plain)
    sampling = _plain_sampling(rng) if plain else _sampling(rng)
    length = len(prompt.token_ids) + most_tokens
    call = f"call-{next(serials)}"
    choices = []
    for index in range(rng.choice([1, 1, 1, 2, 4])):
        own = pb.SamplingParams()
        own.CopyFrom(sampling)
        own.seed += index
        choices.append(Request(call, index, next(serials), prompt, own, Mailbox(Turnstile()), length))
    return choices


def _prompt(rng: random.Random, plain: bool) -> tuple[Prompt, int]:
    """And the most tokens that may follow."""
    text, length = rng.randrange(_TEXTS), rng.choice(_LENGTHS)
    tokens = [(37 * text + 7 * place) % 500 + 40 for place in range(length)]
    if rng.random() < 0.3:
        tokens[-1] = rng.randrange(40, VOCAB_SIZE)
    room = MAX_LENGTH - length
    most = min(rng.choice([1, 1, 2, 3, 4, 5, 8, 12, 20, 40, room]), room)
    grammar = "" if plain else rng.choice(("", "", "", *_GRAMMARS))
    ends_late = not grammar and rng.random() < 0.5
    stops = frozenset({EOS}) if grammar or ends_late else frozenset(rng.sample(range(VOCAB_SIZE), 60))
    least = 0 if grammar or plain else rng.choice([0, 0, min(most, 5), most])
    return Prompt(tuple(tokens), length + least, stops, rng.choice(["", "", "salt"]), grammar), most


def _plain_sampling(rng: random.Random) -> pb.SamplingParams:
    return pb.SamplingParams(
        temperature=rng.choice([0.0, 1.0, 1.0]), top_p=1.0, repetition_penalty=1.0, seed=rng.randrange(3)
    )


def _sampling(rng: random.Random) -> pb.SamplingParams:
    sampling = _plain_sampling(rng)
    if rng.random() < 0.3:
        sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty = 1.3, 0.7, 0.3
    if rng.random() < 0.2:
        sampling.logit_bias[45] = 5.0
    if rng.random() < 0.3:
        sampling.top_k = 20
    if rng.random() < 0.3:
        sampling.logprobs = rng.randrange(3)
    return sampling
