"""Takes reasoning and tool calls out of an answer that comes piece by piece, however it is cut."""

import re
from collections.abc import Callable, Set
from dataclasses import dataclass

from router import tool_call
from router.answer_format import (
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
from router.incoming import Incoming, Steps
from router.json_scan import JsonScan
from router.tool_call import ToolCall
from router.trimmed import BLANKS, Trimmed
from twostroke.v1 import inference_pb2 as pb

_BLANKS = re.compile(f"[{BLANKS}]+")

# Of a tool, where it is no JSON.
NAME = re.compile(r"[\w./:-]+")
MAX_NAME = 256


@dataclass(frozen=True, slots=True)
class Parts:
    """What came of an answer since the last ones."""

    text: str
    reasoning: str
    calls: list[pb.ToolCall]


class AnswerParser:
    """An answer is reasoning, if it begins with that, and then text with calls in it. Text goes out as it comes, a call
    when it is complete. What begins as a call and is none is text to the last letter; what looks like a mark inside of
    that, or of reasoning, is none.

    Args:
        form: how the model marks them.
        in_reasoning: the prompt ends with the reasoning's beginning.
        tools: names of those that the model may call.
        new_id: makes an id for a call that has none, out of its number.
    """

    def __init__(
        self, form: AnswerFormat, *, in_reasoning: bool, tools: Set[str], new_id: Callable[[int], str]
    ) -> None:
        self._form = form
        self._tools = tools
        self._new_id = new_id
        self._incoming = Incoming()
        self._held: list[str] = []  # what may be a call, from its beginning on
        self._text = Trimmed()
        self._reasoning = Trimmed()
        self._calls: list[pb.ToolCall] = []
        self._called = 0
        self._grammar = self._answer(in_reasoning)

    def feed(self, text: str, *, last: bool) -> Parts:
        """What is certain now; all of it with the last."""
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
            # Some models open again what the prompt has opened already.
            opened = yield from incoming.takes(form.seen(THINK))
            if opened or in_reasoning:
                yield from self._reasons()
        if form.calls is Calls.BARE and self._tools:
            yield from self._bare_calls()
        while (yield from self._text_to_a_call()):
            if form.calls is Calls.TAGGED:
                yield from self._tagged_call()
            else:
                yield from self._listed_calls()

    def _reasons(self) -> Steps[None]:
        self._reasoning.taken_out()
        if (yield from self._give(self._reasoning, END_THINK)):
            self._reasoning.taken_out()
        self._text.taken_out()

    def _text_to_a_call(self) -> Steps[bool]:
        match self._form.calls:
            case Calls.TAGGED:
                return (yield from self._give(self._text, TOOL_CALL))
            case Calls.NAMED | Calls.LISTED:
                return (yield from self._give(self._text, TOOL_CALLS))
            case _:
                return (yield from self._give(self._text, None))

    def _tagged_call(self) -> Steps[None]:
        self._hold(self._form.seen(TOOL_CALL))
        call = yield from self._object_call()
        # An answer may end with the object, or in the middle of the mark after it: it lacks nothing of the call.
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

    # ------------------------------------------------------------ its words

    def _give(self, part: Trimmed, mark: str | None) -> Steps[bool]:
        """All up to a mark, or the end. Whether there was a mark."""
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
        """With the white space around it."""
        self._hold((yield from self._incoming.run(_BLANKS)))
        call = tool_call.of_object((yield from self._object()))
        if call is not None:
            self._hold((yield from self._incoming.run(_BLANKS)))
        return call

    def _object(self) -> Steps[str]:
        """As far as what follows may be a JSON object; nothing where it is not one."""
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

    # ------------------------------------------------------------ what became of what was held back

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
