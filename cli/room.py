"""What of a conversation the context has room for, and how long an answer: asked where the router says that it is
full."""

from dataclasses import dataclass

from cli.options import Sampling
from twostroke import ChatOptions, Client, Message, Messages

# Of the context, the part that an answer must have room in before old turns are left out for it.
SHARE_OF_ANSWER = 4


@dataclass(frozen=True, slots=True)
class Fitting:
    """What to ask instead, and the most tokens that its answer may have."""

    messages: list[Message]
    max_tokens: int


def room_for_answer(client: Client, prompt: str | Messages, sampling: Sampling) -> int | None:
    """Tokens that are left for the answer, where nobody has said how many it may have and the usual number is too many.
    None where its length is not what is wrong."""
    left = _longest(client) - _tokens(client, prompt, sampling)
    return left if sampling.max_tokens is None and 0 < left < sampling.most_tokens else None


def fit(client: Client, messages: list[Message], sampling: Sampling) -> Fitting | None:
    """The conversation without as many of its oldest turns as it takes; a system message stays. None where its length
    is not what is wrong, or its last question alone is too long."""
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
