"""Takes reasoning and tool calls out of an answer that is streamed, however it is cut into pieces."""

import re
from collections.abc import Callable, Set
from dataclasses import dataclass

from router.answers import tool_call
from router.answers.incoming import Incoming, Steps
from router.answers.json_scan import JsonScan
from router.answers.tool_call import ToolCall
from router.answers.trimmed import BLANKS, Trimmed
from router.vocabulary.answer_format import (
    ARGS,
    CALL_ID,
    END_THINK,
    END_TOOL_CALL,
    PYTHON_TAG,
    THINK,
    TOOL_CALL,
    TOOL_CALLS,
    AnswerFormat,
    Calls,
)
from twostroke.v1 import inference_pb2 as pb

_BLANKS = re.compile(f"[{BLANKS}]+")

# The mark that calls begin with, in forms in which they come between text.
_BEFORE_CALLS: dict[Calls | None, str] = {Calls.TAGGED: TOOL_CALL, Calls.NAMED: TOOL_CALLS, Calls.LISTED: TOOL_CALLS}

# The name of a tool, where it is not written in JSON.
NAME = re.compile(r"[\w./:-]+")
MAX_NAME = 256


@dataclass(frozen=True, slots=True)
class Parts:
    """What has become certain of an answer since the last call."""

    text: str
    reasoning: str
    calls: list[pb.ToolCall]


class AnswerParser:
    """An answer may begin with reasoning; then comes text with tool calls in it. Text is passed on as it comes, a call
    once it is complete. What begins like a call and turns out to be none is passed on as text, unchanged, and marks
    inside it are not looked for; nor are marks other than its end inside reasoning.

    It is a recursive-descent parser written as generators, which yield where they need more text.

    Args:
        form: how the model marks reasoning and calls.
        in_reasoning: the prompt ends with the beginning of reasoning.
        tools: names of the tools that the model may call.
        new_id: makes an id for a call to which the model gave none, from the call's number in the answer.
    """

    def __init__(
        self, form: AnswerFormat, *, in_reasoning: bool, tools: Set[str], new_id: Callable[[int], str]
    ) -> None:
        self._form = form
        self._tools = tools
        self._new_id = new_id
        self._incoming = Incoming()
        self._held: list[str] = []  # what may turn out to be a call, from its beginning on
        self._text = Trimmed()
        self._reasoning = Trimmed()
        self._calls: list[pb.ToolCall] = []
        self._called = 0
        self._grammar = self._answer(in_reasoning)

    def feed(self, text: str, *, last: bool) -> Parts:
        """Takes the next piece of the answer. With the `last` one everything that was held back is returned."""
        self._incoming.add(text, last=last)
        next(self._grammar, None)
        if last:
            self._text.finish()
            self._reasoning.finish()
        calls, self._calls = self._calls, []
        return Parts(self._text.take(), self._reasoning.take(), calls)

    # ------------------------------------------------------------ the grammar

    def _answer(self, in_reasoning: bool) -> Steps[None]:
        form, incoming = self._form, self._incoming
        self._text.give((yield from incoming.run(_BLANKS)))
        if form.reasoning:
            # Some models repeat the mark with which the prompt ends.
            opened = yield from incoming.takes(form.seen(THINK))
            if opened or in_reasoning:
                yield from self._reasons()
        if form.calls is Calls.BARE and self._tools:
            yield from self._bare_calls()
        while (yield from self._give(self._text, _BEFORE_CALLS.get(form.calls))):
            if form.calls is Calls.TAGGED:
                yield from self._tagged_call()
            else:
                yield from self._listed_calls()

    def _reasons(self) -> Steps[None]:
        self._reasoning.taken_out()
        if (yield from self._give(self._reasoning, END_THINK)):
            self._reasoning.taken_out()
        self._text.taken_out()

    def _tagged_call(self) -> Steps[None]:
        self._hold(self._form.seen(TOOL_CALL))
        call = yield from self._object_call()
        # If the answer ends before the closing mark, or inside it, the call is complete all the same.
        if call is not None and (yield from self._incoming.takes(self._form.seen(END_TOOL_CALL), or_end=True)):
            self._call(call)
        else:
            self._no_call()

    def _listed_calls(self) -> Steps[None]:
        incoming, form = self._incoming, self._form
        self._hold(form.seen(TOOL_CALLS))
        self._hold((yield from incoming.run(_BLANKS)))
        if (yield from incoming.takes("[")):
            self._hold("[")
            while (call := (yield from self._object_call())) is not None:
                self._call(call)
                if not (yield from incoming.takes(",")):
                    yield from incoming.takes("]")
                    return
        elif name := (yield from self._name()):
            id = (yield from self._name()) if (yield from self._held_mark(CALL_ID)) else None
            if (yield from self._held_mark(ARGS)):
                self._hold((yield from incoming.run(_BLANKS)))
                call = tool_call.of_arguments(name, (yield from self._object()), id)
                if call is not None:
                    self._call(call)
                    return
        self._no_call()

    def _bare_calls(self) -> Steps[None]:
        while True:
            self._hold((yield from self._incoming.run(_BLANKS)))
            yield from self._held_mark(PYTHON_TAG)
            call = yield from self._object_call()
            if call is None or call.name not in self._tools:
                break
            if not (yield from self._incoming.takes(";", or_end=True)):
                break
            self._call(call)
        self._no_call()

    # ------------------------------------------------------------ parts of the grammar

    def _give(self, part: Trimmed, mark: str | None) -> Steps[bool]:
        """Passes on everything up to a mark or the end. Returns whether there was a mark."""
        incoming = self._incoming
        seen = None if mark is None else self._form.seen(mark)
        while True:
            if seen is None:
                text, found = incoming.take_to(len(incoming.text)), False
            else:
                text, found = incoming.take_before(seen)
            part.give(self._form.shown(text))
            if found or incoming.over:
                return found
            yield

    def _object_call(self) -> Steps[ToolCall | None]:
        """A call written as a JSON object, with the white space around it; None if there is none."""
        self._hold((yield from self._incoming.run(_BLANKS)))
        call = tool_call.of_object((yield from self._object()))
        if call is not None:
            self._hold((yield from self._incoming.run(_BLANKS)))
        return call

    def _object(self) -> Steps[str]:
        """The source of a JSON object, empty if what follows is none. What was looked at is held back either way."""
        incoming, scan = self._incoming, JsonScan()
        pieces: list[str] = []
        while True:
            piece = incoming.take_to(scan.feed(incoming.text, incoming.place))
            self._hold(piece)
            pieces.append(piece)
            if scan.over or incoming.over:
                return "".join(pieces) if scan.complete else ""
            yield

    def _name(self) -> Steps[str]:
        name = yield from self._incoming.run(NAME, MAX_NAME)
        self._hold(name)
        return name

    def _held_mark(self, mark: str) -> Steps[bool]:
        seen = self._form.seen(mark)
        there = yield from self._incoming.takes(seen)
        if there:
            self._hold(seen)
        return there

    # ------------------------------------------------------------ what may be a call

    def _hold(self, text: str) -> None:
        self._held.append(text)

    def _call(self, call: ToolCall) -> None:
        self._held.clear()
        self._text.taken_out()
        id = call.id or self._new_id(self._called)
        self._calls.append(pb.ToolCall(id=id, name=call.name, arguments=call.arguments))
        self._called += 1

    def _no_call(self) -> None:
        self._text.give(self._form.shown("".join(self._held)))
        self._held.clear()
