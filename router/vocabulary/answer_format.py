"""The marks around reasoning and tool calls in a model's answers, as its chat template and vocabulary show them."""

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

# What stands for a mark that is a special token in the text that is parsed: a lone UTF-16 surrogate, which neither the
# text of tokens nor a stop string can contain.
_SIGNS = {mark: chr(0xD800 + place) for place, mark in enumerate(MARKS)}


class Calls(Enum):
    TAGGED = auto()  # <tool_call>{"name": ..., "arguments": {...}}</tool_call>, as often as there are calls
    NAMED = auto()  # name[ARGS]{...}, with [TOOL_CALLS] before each
    LISTED = auto()  # [TOOL_CALLS] and a list of such objects; either of these two may come for the other
    BARE = auto()  # the whole answer is such an object, or several with semicolons between them


# The first that is found counts: models that were trained further still have the marks of earlier ones.
_SPOKEN_BY = {TOOL_CALL: Calls.TAGGED, ARGS: Calls.NAMED, TOOL_CALLS: Calls.LISTED, PYTHON_TAG: Calls.BARE}


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """
    Args:
        reasoning: whether an answer may begin with <think>.
        calls: the form of tool calls; None if it is not known.
        signs: by id, the special tokens that are marks, and what stands for each in the text that is parsed. Then the
            same mark spelled with other tokens is ordinary text.
        tokens: the id of each mark that is one token, special or not.
    """

    reasoning: bool = False
    calls: Calls | None = None
    signs: Mapping[int, str] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)

    def seen(self, mark: str) -> str:
        """How a mark looks in the text that is parsed."""
        sign = _SIGNS[mark]
        return sign if sign in self.signs.values() else mark

    def shown(self, text: str) -> str:
        """The text for the client, without what stands for special tokens."""
        for sign in self.signs.values():
            text = text.replace(sign, "")
        return text

    def opens_reasoning(self, prompt: str) -> bool:
        """Whether a rendered prompt ends with the beginning of reasoning, so that the answer goes on inside it."""
        return self.reasoning and prompt.rstrip().endswith(THINK)

    def closes_reasoning(self, prompt: str) -> bool:
        """Whether a rendered prompt ends with the end of reasoning, which may be empty, so that the answer has none."""
        return self.reasoning and prompt.rstrip().endswith(END_THINK)


def of(template: str, token_of: Callable[[str], int | None], special: Set[int]) -> AnswerFormat:
    """
    Args:
        template: the source of the model's chat templates.
        token_of: returns the id of a token; None if there is none with this text.
        special: ids of the special tokens.
    """
    tokens = {mark: token for mark in MARKS if (token := token_of(mark)) is not None}

    def known() -> Calls | None:
        for there in (template, tokens):  # the template shows what the model writes, the vocabulary what it may write
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
