import sys
from itertools import pairwise
from types import FrameType
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from router.answers.stop_strings import StopStrings

LETTERS = st.text(alphabet="ab", max_size=40)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4)


def by_definition(text: str, stops: list[str]) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run(text: str, stops: list[str], cuts: list[int]) -> tuple[str, str | None]:
    watcher = StopStrings(stops)
    out = ""
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    for begin, end in pairwise(edges):
        certain, stop = watcher.feed(text[begin:end])
        out += certain
        if stop is not None:
            return out, stop
    return out + watcher.finish(), None


@given(LETTERS, STOPS, st.lists(st.integers(0, 40)))
@example("aab", ["aab", "ab"], [1, 2])
@example("abab", ["abb", "bab"], [])
def test_the_first_complete_stop_string_ends_the_text_however_it_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    assert run(text, stops, cuts) == by_definition(text, stops)


@given(LETTERS, STOPS, st.integers(0, 40))
@example("aab", ["aab"], 2)
@example("aaa", ["aa"], 2)
def test_what_is_complete_before_the_text_may_end_is_passed_over(text: str, stops: list[str], before: int) -> None:
    def by_its_end(end: int) -> tuple[str, str] | None:
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        return (text[: end - len(max(complete, key=len))], max(complete, key=len)) if complete else None

    ends = (by_its_end(end) for end in range(before + 1, len(text) + 1))
    watcher = StopStrings(stops)
    out, stop = watcher.feed(text[:before], may_end=False)
    assert stop is None
    certain, stop = watcher.feed(text[before:])
    out += certain if stop is not None else certain + watcher.finish()
    assert (out, stop) == next((end for end in ends if end), (text, None))


def test_no_more_is_held_back_than_may_become_a_stop_string() -> None:
    watcher = StopStrings(["\n\nUser:"])
    assert watcher.feed("Hello\n") == ("Hello", None)
    assert watcher.feed("\nU") == ("", None)
    assert watcher.feed("nited") == ("\n\nUnited", None)
    assert watcher.feed("!\n\n") == ("!", None)
    assert watcher.finish() == "\n\n"


@pytest.mark.parametrize("text", ["a" * 2_000, "ab" * 1_000, ("a" * 255 + "b") * 8])
def test_the_work_for_a_character_depends_neither_on_the_strings_number_nor_on_their_length(text: str) -> None:
    watcher = StopStrings(["a" * (255 - place) + "c" * (place + 1) for place in range(16)])
    assert lines_run(watcher, text) < 10 * len(text)


def lines_run(watcher: StopStrings, text: str) -> int:
    """Lines of Python that it takes to feed the text, which is without a stop string, in pieces of eight characters."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for place in range(0, len(text), 8):
            _, stop = watcher.feed(text[place : place + 8])
            assert stop is None
    finally:
        sys.settrace(before)
    return count
