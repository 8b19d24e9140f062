"""How a model marks reasoning and tool calls in its answers, as far as its chat template and its vocabulary tell."""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from enum import Enum, auto

THINK = "<think>"
END_THINK = "</think>"
TOOL_CALL = "<tool_call>"
END_TOOL_CALL = "</tool_call>"
TOOL_CALLS = "[TOOL_CALLS]"
CALL_ID = "[CALL_ID]"
ARGS = "[ARGS]"
PYTHON_TAG = "<|python_tag|>"

MARKS = (THINK, END_THINK, TOOL_CALL, END_TOOL_CALL, TOOL_CALLS, CALL_ID, ARGS, PYTHON_TAG)

# Halves of UTF-16 pairs, one for each mark: no token spells one, and no stop string has one.
_SIGNS = {mark: chr(0xD800 + place) for place, mark in enumerate(MARKS)}


class Calls(Enum):
    TAGGED = auto()  # <tool_call>{"name": ..., "arguments": {...}}</tool_call>, as often as there are calls
    NAMED = auto()  # name[ARGS]{...}, with [TOOL_CALLS] before each
    LISTED = auto()  # [TOOL_CALLS] and a list of such objects; either of these two may come for the other
    BARE = auto()  # the whole answer is such an object, or several with semicolons between them


# In this order: vocabularies of models that were trained further have marks of those before, too.
_SPOKEN_BY = {TOOL_CALL: Calls.TAGGED, ARGS: Calls.NAMED, TOOL_CALLS: Calls.LISTED, PYTHON_TAG: Calls.BARE}


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """
    Args:
        reasoning: whether an answer may begin with <think>.
        calls: in what form it calls tools; None where that is not known.
        signs: special tokens that are marks, to what stands for them in the text that is parsed. A text that spells
            the mark letter by letter is none.
        tokens: marks that are one token, special or not, to that.
    """

    reasoning: bool = False
    calls: Calls | None = None
    signs: Mapping[int, str] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)

    def seen(self, mark: str) -> str:
        """What a mark is in the text that is parsed."""
        sign = _SIGNS[mark]
        return sign if sign in self.signs.values() else mark

    def shown(self, text: str) -> str:
        """Text as it is where nothing is parsed: special tokens have none."""
        for sign in self.signs.values():
            text = text.replace(sign, "")
        return text

    def opens_reasoning(self, prompt: str) -> bool:
        """Whether the answer to a rendered prompt begins in the middle of reasoning."""
        return self.reasoning and prompt.rstrip().endswith(THINK)

    def closes_reasoning(self, prompt: str) -> bool:
        """Whether a rendered prompt ends with reasoning that is over, such as none at all."""
        return self.reasoning and prompt.rstrip().endswith(END_THINK)


def of(template: str, token_of: Callable[[str], int | None], special: Set[int]) -> AnswerFormat:
    """
    Args:
        template: the source of the model's chat templates.
        token_of: the id of a token, by its text.
        special: those which are special.
    """
    tokens = {mark: token for mark in MARKS if (token := token_of(mark)) is not None}

    def known() -> Calls | None:
        for there in (template, tokens):  # what the template writes says more than what the vocabulary could
            for mark, calls in _SPOKEN_BY.items():
                if mark in there:
                    return calls
        return None

    return AnswerFormat(
        reasoning=any(mark in template or mark in tokens for mark in (THINK, END_THINK)),
        calls=known(),
        signs={token: _SIGNS[mark] for mark, token in tokens.items() if token in special},
        tokens=tokens,
    )
