"""How much of a conversation, and how long an answer, the context has room for. Asked once the router has said that it
is full."""

from dataclasses import dataclass

from cli.options import Sampling
from twostroke import ChatOptions, Client, Message, Messages

# Old turns are left out until 1 / SHARE_OF_ANSWER of the context is free for the answer.
SHARE_OF_ANSWER = 4


@dataclass(frozen=True, slots=True)
class Fitting:
    """What to ask instead, and the most tokens that the answer may have."""

    messages: list[Message]
    max_tokens: int


def room_for_answer(client: Client, prompt: str | Messages, sampling: Sampling) -> int | None:
    """Tokens that are left for the answer, if the usual number is too many and the user has not set one. None if the
    length is not what is wrong."""
    left = _longest(client) - _tokens(client, prompt, sampling)
    return left if sampling.max_tokens is None and 0 < left < sampling.most_tokens else None


def fit(client: Client, messages: list[Message], sampling: Sampling) -> Fitting | None:
    """The conversation without its oldest turns, as many as it takes; a system message stays. None if the length is not
    what is wrong, or the last question alone is too long."""
    longest, wanted = _longest(client), sampling.most_tokens
    least = min(wanted, longest // SHARE_OF_ANSWER) if sampling.max_tokens is None else wanted
    begin = 1 if messages[0]["role"] == "system" else 0
    kept = messages
    while (left := longest - _tokens(client, kept, sampling)) < least and len(kept) > begin + 1:
        kept = [*kept[:begin], *kept[begin + 2 :]]  # a question and its answer
    if (kept == messages and left >= wanted) or left < (1 if sampling.max_tokens is None else wanted):
        return None
    return Fitting(kept, min(wanted, left))


def _longest(client: Client) -> int:
    return client.model().limits.max_total_tokens


def _tokens(client: Client, prompt: str | Messages, sampling: Sampling) -> int:
    options: ChatOptions = {}
    if not isinstance(prompt, str) and (variables := sampling.options().get("template_variables")) is not None:
        options["template_variables"] = variables
    return len(client.tokenize(prompt, **options))
