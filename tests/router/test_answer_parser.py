"""What becomes of an answer's text, in each form that models mark reasoning and calls in."""

import json
import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router import json_object
from router.answers.answer_parser import AnswerParser
from router.vocabulary import answer_format
from router.vocabulary.answer_format import AnswerFormat, Calls

# Marks that are text, as in Qwen3's vocabulary, and one of them that is a special token, as in Mistral's.
TAGGED = AnswerFormat(reasoning=True, calls=Calls.TAGGED)
LISTED = AnswerFormat(reasoning=True, calls=Calls.LISTED)
BARE = AnswerFormat(reasoning=True, calls=Calls.BARE)
SPECIAL = answer_format.of("", {mark: place for place, mark in enumerate(answer_format.MARKS)}.get, set(range(8)))

Result = tuple[str, str, list[tuple[str, str, Any]]]
"""Text, reasoning, and calls: id, name and arguments."""


def parsed(form: AnswerFormat, *pieces: str, in_reasoning: bool = False, tools: set[str] | None = None) -> Result:
    tools = {"weather", "time"} if tools is None else tools
    parser = AnswerParser(form, in_reasoning=in_reasoning, tools=tools, new_id="made-{}".format)
    parts = [parser.feed(piece, last=False) for piece in pieces] + [parser.feed("", last=True)]
    calls = [(call.id, call.name, json.loads(call.arguments)) for part in parts for call in part.calls]
    return "".join(part.text for part in parts), "".join(part.reasoning for part in parts), calls


def in_pieces(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    return [text[begin:end] for begin, end in pairwise(edges)]


def call(name: str, arguments: str = "{}", key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def tagged(name: str, arguments: str = "{}") -> str:
    return f"<tool_call>\n{call(name, arguments)}\n</tool_call>"


WEATHER = ("made-0", "weather", {"place": "Zürich"})
PLACE = '{"place": "Zürich"}'


# ---------------------------------------------------------------- forms


@pytest.mark.parametrize(
    ("form", "text", "calls"),
    [
        (TAGGED, tagged("weather", PLACE), [WEATHER]),
        (TAGGED, f"<tool_call>{call('weather', PLACE)}</tool_call>", [WEATHER]),
        (TAGGED, f"{tagged('weather', PLACE)}\n{tagged('time')}", [WEATHER, ("made-1", "time", {})]),
        (TAGGED, tagged("weather", PLACE).removesuffix("</tool_call>"), [WEATHER]),
        (TAGGED, tagged("weather", PLACE).removesuffix("call>"), [WEATHER]),
        (TAGGED, tagged("time", '{"x": "</tool_call>"}'), [("made-0", "time", {"x": "</tool_call>"})]),
        (TAGGED, tagged("none of the tools"), [("made-0", "none of the tools", {})]),
        (LISTED, f"[TOOL_CALLS] [{call('weather', PLACE)}]", [WEATHER]),
        (LISTED, f"[TOOL_CALLS][{call('weather', PLACE)},\n{call('time')} ]", [WEATHER, ("made-1", "time", {})]),
        (LISTED, f"[TOOL_CALLS][{call('weather', PLACE)}", [WEATHER]),
        (LISTED, '[TOOL_CALLS][{"name": "time", "arguments": {}, "id": "VvvODy9mT"}]', [("VvvODy9mT", "time", {})]),
        (LISTED, '[TOOL_CALLS][{"name": "time", "arguments": {}, "id": 7}]', [("made-0", "time", {})]),
        (LISTED, f"[TOOL_CALLS]weather[ARGS]{PLACE}", [WEATHER]),
        (LISTED, f"[TOOL_CALLS]weather[ARGS] {PLACE}[TOOL_CALLS]time[ARGS]{{}}", [WEATHER, ("made-1", "time", {})]),
        (LISTED, "[TOOL_CALLS]time[CALL_ID]VvvODy9mT[ARGS]{}", [("VvvODy9mT", "time", {})]),
        (BARE, call("weather", PLACE, "parameters"), [WEATHER]),
        (BARE, f"<|python_tag|>{call('weather', PLACE, 'parameters')}", [WEATHER]),
        (BARE, f"\n<|python_tag|> {call('weather', PLACE)}\n", [WEATHER]),
        (BARE, f"{call('weather', PLACE)}; {call('time')}", [WEATHER, ("made-1", "time", {})]),
        (BARE, f"{call('weather', PLACE)};<|python_tag|>{call('time')};", [WEATHER, ("made-1", "time", {})]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("thoughts", ["", "<think>\nHm, \n\nyes.\n</think>\n\n"], ids=["", "reasoning"])
def test_calls(form: AnswerFormat, text: str, calls: list[Any], thoughts: str) -> None:
    assert parsed(form, thoughts + text) == ("", "Hm, \n\nyes." if thoughts else "", calls)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (TAGGED, '<tool_call>{"name": "weather"'),
        (TAGGED, f"<tool_call>{call('weather')} and"),
        (TAGGED, f"<tool_call>{call('weather')}</tool_response>"),
        (TAGGED, f"<tool_call>[{call('weather')}]</tool_call>"),
        (TAGGED, '<tool_call>{"name": "weather"}</tool_call>'),
        (TAGGED, "<tool_call>{'name': 'weather', 'arguments': {}}</tool_call>"),
        (TAGGED, f"<tool_call>\n{call('weather', '[]')}\n</tool_call>"),
        (TAGGED, f"<tool_call>{call('')}</tool_call>"),
        (TAGGED, '<tool_call>{"name": 7, "arguments": {}}</tool_call>'),
        (TAGGED, tagged("weather", '{"x": NaN}')),
        (TAGGED, tagged("weather", '{"x": 1e999}')),
        (TAGGED, tagged("weather", '{"x": "\\ud800"}')),
        (TAGGED, tagged("weather", f'{{"x": {"9" * 5_000}}}')),
        (TAGGED, tagged("weather", '{"x": "a\nb"}')),
        (TAGGED, tagged("weather", '{"x": ' + "[" * 63 + "]" * 63 + "}")),
        (TAGGED, tagged("weather", f'{{"x": "{"ü" * (json_object.MAX_BYTES // 2)}"}}')),
        (TAGGED, tagged("weather", f'{{"x": [1{",1" * 130_000}]}}')),  # as templates print it, it is too large
        (TAGGED, "<tool_call"),
        (TAGGED, "<tool_call>"),
        (TAGGED, "a < b <tool> </tool_call>\n"),
        (TAGGED, "[TOOL_CALLS]time[ARGS]{}"),
        (LISTED, "[TOOL_CALLS]"),
        (LISTED, "[TOOL_CALLS] []"),
        (LISTED, "[TOOL_CALLS] [1]"),
        (LISTED, '[TOOL_CALLS][{"name": "time"'),
        (LISTED, "[TOOL_CALLS]I call weather."),
        (LISTED, "[TOOL_CALLS]time[CALL_ID]a[TOOL]"),
        (LISTED, "[TOOL_CALLS]time[ARGS]{"),
        (LISTED, "[TOOL_CALLS]time[ARGS] no"),
        (LISTED, f"[TOOL_CALLS]{'a' * 257}[ARGS]{{}}"),
        (LISTED, tagged("weather")),
        (BARE, call("none of the tools")),
        (BARE, '{"answer": 42}\n'),
        (BARE, f"{call('weather')} is what I call."),
        (BARE, f"I call {call('weather')}"),
        (BARE, f"\n<|python_tag|>print({call('weather')})"),
        (BARE, f"[{call('weather')}]"),
        (BARE, call("weather", PLACE, "args")),
        (BARE, call("weather")[:-1]),
        (AnswerFormat(), f"<think>Hm.</think>\n{tagged('weather')}"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_what_is_no_call_is_text_to_the_last_letter(form: AnswerFormat, text: str) -> None:
    assert parsed(form, text) == (text, "", [])


def test_what_comes_after_a_call_that_is_none_is_looked_at_again() -> None:
    bad = '<tool_call>{"name": '
    assert parsed(TAGGED, bad + tagged("weather", PLACE)) == (bad.rstrip(), "", [WEATHER])
    assert parsed(LISTED, f"[TOOL_CALLS]time[TOOL_CALLS]weather[ARGS]{PLACE}") == ("[TOOL_CALLS]time", "", [WEATHER])
    assert parsed(LISTED, f"[TOOL_CALLS]no: [TOOL_CALLS]weather[ARGS]{PLACE}") == ("[TOOL_CALLS]no:", "", [WEATHER])
    listed = f"[TOOL_CALLS][{call('weather', PLACE)}, {{bad}}]"
    assert parsed(LISTED, listed) == ("{bad}]", "", [WEATHER])
    assert parsed(BARE, f"{call('weather', PLACE)}; {call('nothing')}") == (call("nothing"), "", [WEATHER])


def test_without_tools_a_json_object_is_an_answer() -> None:
    assert parsed(BARE, call("weather"), tools=set()) == (call("weather"), "", [])


# ---------------------------------------------------------------- reasoning


@pytest.mark.parametrize(
    ("text", "in_reasoning", "expected"),
    [
        ("<think>Hm.</think>Yes.", False, ("Yes.", "Hm.", [])),
        ("\n <think>\n\n Hm.\n\n</think>\n\n Yes.\n", False, ("Yes.\n", "Hm.", [])),
        ("<think>\n\n</think>\n\nYes.", False, ("Yes.", "", [])),
        ("Hm.\n</think>\n\nYes.", True, ("Yes.", "Hm.", [])),
        ("\n<think>\nHm.\n</think>\n\nYes.", True, ("Yes.", "Hm.", [])),
        ("</think>Yes.", True, ("Yes.", "", [])),
        ("Hm.\n", True, ("", "Hm.\n", [])),
        ("<think>Hm. </thi", False, ("", "Hm. </thi", [])),
        ("<think>", False, ("", "", [])),
        ("<thi", False, ("<thi", "", [])),
        ("", True, ("", "", [])),
        ("", False, ("", "", [])),
        ("Yes.\n</think>\n", False, ("Yes.\n</think>\n", "", [])),
        ("Yes. <think>Hm.</think>", False, ("Yes. <think>Hm.</think>", "", [])),
        ("<think><think></think></think>", False, ("</think>", "<think>", [])),
        (f"<think>{tagged('time')}</think>", False, ("", tagged("time"), [])),
        (f"<think>Hm.</think>{tagged('weather', PLACE)}", False, ("", "Hm.", [WEATHER])),
        (f"<think>{tagged('time')}", False, ("", tagged("time"), [])),
    ],
)
def test_reasoning_is_what_an_answer_begins_with(text: str, in_reasoning: bool, expected: Result) -> None:
    assert parsed(TAGGED, text, in_reasoning=in_reasoning) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"\n\n{tagged('time')}\n\n", ""),
        (f"Well.\n\n{tagged('time')}\n", "Well."),
        (f"{tagged('time')}\n\nDone.\n", "Done.\n"),
        (f"Well.\n{tagged('time')} {tagged('time')}\nDone.", "Well.\n \nDone."),
        (f"a{tagged('time')}b", "ab"),
        ("\n a \n b\t\n", "\n a \n b\t\n"),
        (" \n", " \n"),
        (f"\u00a0{tagged('time')}\u2003", "\u00a0\u2003"),
    ],
)
def test_white_space_stays_between_texts_alone(text: str, expected: str) -> None:
    assert parsed(TAGGED, text)[0] == expected


# ---------------------------------------------------------------- marks that are special tokens


def signs(text: str) -> str:
    """As the detokenizer writes it."""
    for mark in answer_format.MARKS:
        text = text.replace(mark, SPECIAL.seen(mark))
    return text


def special(calls: Calls) -> AnswerFormat:
    return AnswerFormat(reasoning=True, calls=calls, signs=SPECIAL.signs)


@pytest.mark.parametrize(
    ("calls", "text"),
    [
        (Calls.TAGGED, tagged("weather", PLACE)),
        (Calls.LISTED, f"[TOOL_CALLS]weather[ARGS]{PLACE}"),
        (Calls.LISTED, f"[TOOL_CALLS] [{call('weather', PLACE)}]"),
        (Calls.BARE, f"<|python_tag|>{call('weather', PLACE)}"),
    ],
)
def test_special_tokens_mark_and_what_spells_them_does_not(calls: Calls, text: str) -> None:
    form = special(calls)
    assert parsed(form, signs(f"<think>Hm.</think>{text}")) == ("", "Hm.", [WEATHER])
    assert parsed(form, text) == (text, "", [])


@pytest.mark.parametrize("calls", Calls)
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<tool_call>{bad}</tool_call>", "{bad}"),
        ("[TOOL_CALLS]I call[ARGS] it", "I call it"),
        ("[TOOL_CALLS]time[CALL_ID]a[CALL_ID]b[ARGS]", "timeab"),
        ("<|python_tag|>print(1)", "print(1)"),
        ('<tool_call>{"a": "<think>"}', '{"a": ""}'),
        ('{"a\\</think>"}', '{"a\\"}'),
        ("a</think>b<think>c", "abc"),
    ],
)
def test_special_tokens_are_not_shown_where_they_mark_nothing(calls: Calls, text: str, shown: str) -> None:
    assert parsed(special(calls), signs(text)) == (shown, "", [])


# ---------------------------------------------------------------- piece by piece

FRAGMENTS = [
    *answer_format.MARKS,
    *(mark[:size] for mark in answer_format.MARKS for size in (1, 5)),
    *" \n[]{};,a",
    "é",
    tagged("weather", PLACE),
    call("time"),
    call("time", key="parameters"),
    '{"name": "time", ',
    "time[ARGS]{}",
]
FORMS = [TAGGED, LISTED, BARE, *map(special, Calls), AnswerFormat()]


@given(
    st.sampled_from(FORMS),
    st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join),
    st.booleans(),
    st.lists(st.integers(0, 200), max_size=8),
)
@settings(deadline=None, derandomize=True, max_examples=400)
def test_the_result_does_not_depend_on_the_pieces(form: AnswerFormat, text: str, begun: bool, cuts: list[int]) -> None:
    if form.signs:
        text = signs(text)
    whole = parsed(form, text, in_reasoning=begun)
    assert parsed(form, *in_pieces(text, cuts), in_reasoning=begun) == whole
    assert parsed(form, *text, in_reasoning=begun) == whole


WORDS = st.sampled_from(["Hm.", "a<b", "<tool", "é", "</tool_call>", '<tool_call>{"name":', "<tool_call>no", "<think>"])
ANSWERS = st.lists(st.tuples(WORDS, st.integers(0, 9)), max_size=8)


@given(ANSWERS, st.lists(st.integers(0, 300), max_size=8))
@settings(deadline=None, derandomize=True)
def test_no_text_is_lost_and_no_call(answer: list[tuple[str, int]], cuts: list[int]) -> None:
    text = "Well." + "".join(word + tagged("time", f'{{"number": {number}}}') for word, number in answer)
    shown, _, calls = parsed(TAGGED, *in_pieces(text, cuts))
    assert shown == "Well." + "".join(word for word, _ in answer)
    assert [arguments["number"] for _, _, arguments in calls] == [number for _, number in answer]


def outs(form: AnswerFormat, *pieces: str) -> list[str]:
    """What goes out with each piece."""
    parser = AnswerParser(form, in_reasoning=False, tools={"time"}, new_id=str)
    parts = [parser.feed(piece, last=False) for piece in pieces]
    return [part.text + part.reasoning + "".join(call.name for call in part.calls) for part in parts]


def test_no_more_is_held_back_than_may_become_a_mark_or_a_call() -> None:
    assert outs(TAGGED, "Hel", "lo <", "b> \n", "x<tool_", "cal", "ler") == [
        "Hel",
        "lo",
        " <b>",
        " \nx",
        "",
        "<tool_caller",
    ]
    assert outs(TAGGED, "<thi", "nk>\n", "Hm", ", ", "no</", "b></think>", "\nYes") == [
        "",
        "",
        "Hm",
        ",",
        " no",
        "</b>",
        "Yes",
    ]
    assert outs(TAGGED, tagged("time")[:-1], ">") == ["", "time"]
    assert outs(LISTED, "[TOOL_CALLS]time[ARGS]{", "}") == ["", "time"]
    assert outs(LISTED, "[TOOL_CALLS][", call("time"), ",", call("time"), "]") == ["", "", "time", "", "time"]
    assert outs(LISTED, "[TOOL_CALLS]time", " is") == ["", "[TOOL_CALLS]time is"]
    assert outs(BARE, "{", "a", "'", "b") == ["", "", "{a'", "b"]
    assert outs(BARE, call("time"), ";", "a") == ["", "time", "a"]
    assert outs(BARE, "Well", "{") == ["Well", "{"]


# ---------------------------------------------------------------- what a model should not write


UNITS = ["{", '{"a":', "[", "<tool_call>", "<tool_call>{", "[TOOL_CALLS]", "[TOOL_CALLS][{", " ", '"', "\\", "<think>"]
UNITS += [tagged("time"), f"{call('time')};", "[TOOL_CALLS]time[ARGS]{}"]


@pytest.mark.parametrize(
    ("form", "beginning"),
    [(TAGGED, ""), (TAGGED, '<tool_call>{"'), (LISTED, ""), (LISTED, '[TOOL_CALLS][{"'), (BARE, ""), (BARE, '{"')],
)
def test_a_long_answer_of_anything_is_done_in_time(form: AnswerFormat, beginning: str) -> None:
    """What takes its length squared would take much longer."""
    for unit in UNITS:
        began = time.process_time()
        parsed(form, beginning + unit * (500_000 // len(unit)))
        assert time.process_time() - began < 2, unit


@pytest.mark.parametrize(
    ("form", "beginning"), [(TAGGED, ""), (TAGGED, '<tool_call>{"'), (LISTED, "[TOOL_CALLS]"), (BARE, "")]
)
@pytest.mark.parametrize("unit", [" ", "a", "{"])
def test_nor_does_it_take_longer_in_pieces(form: AnswerFormat, beginning: str, unit: str) -> None:
    began = time.process_time()
    parsed(form, beginning, *(unit * 2 for _ in range(30_000)))
    assert time.process_time() - began < 5
