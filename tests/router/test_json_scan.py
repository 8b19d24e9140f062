import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router import json_object
from router.answers.json_scan import JsonScan

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
CUTS = st.lists(st.integers(0, 200), max_size=8)


def scanned(text: str, cuts: list[int]) -> tuple[bool, bool, int]:
    """Whether it is complete, whether it is over, and where that is."""
    scan = JsonScan()
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    for begin, end in pairwise(edges):
        # Each piece with a letter of the one before it, which is not looked at again.
        piece = text[max(begin - 1, 0) : end]
        skipped = min(begin, 1)
        place = scan.feed(piece, skipped)
        if scan.over:
            return scan.complete, True, begin + place - skipped
        assert place == len(piece)
    return scan.complete, scan.over, len(text)


@given(st.dictionaries(st.text(max_size=4), JSON, max_size=4), st.booleans(), st.sampled_from([None, 2]), CUTS)
@settings(deadline=None, derandomize=True, max_examples=50)
def test_an_object_ends_where_it_does(value: dict[str, Any], ascii: bool, indent: int | None, cuts: list[int]) -> None:
    text = json.dumps(value, ensure_ascii=ascii, indent=indent)
    assert scanned(text + '}, {"x', cuts) == (True, True, len(text))


@given(st.text('{}[]",:\\ta1 \n<é\ud800', max_size=30), CUTS)
@settings(deadline=None, derandomize=True, max_examples=300)
def test_any_text_is_scanned_alike_however_it_is_cut(text: str, cuts: list[int]) -> None:
    result = scanned(text, [])
    assert scanned(text, cuts) == result
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return
    if isinstance(value, dict) and "\ud800" not in text:
        assert result == (True, True, end)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", 0),
        ("a", 0),
        ("[", 0),
        ("}", 0),
        ('{"a": <', 6),
        ('{"a": [}', 7),
        ('{"a\n"', 3),
        ('{"\ud800"', 2),
        ('{"\\\ud800"', 3),
        ("{'a'", 1),
    ],
)
def test_what_is_none_is_given_up_at_the_first_letter_that_tells(text: str, place: int) -> None:
    assert scanned(text, []) == (False, bool(text), place)


@pytest.mark.parametrize("brackets", ["{", '{"a":[', '{"a":'])
def test_what_is_too_deep(brackets: str) -> None:
    levels = json_object.MAX_DEPTH // brackets.replace("[", "{").count("{")
    closers = {"{": "}", '{"a":[': "]}", '{"a":': "}"}[brackets]
    deepest = brackets * levels + closers * levels
    assert scanned(deepest, []) == (True, True, len(deepest))
    complete, over, place = scanned(brackets * 100_000, [])
    assert (complete, over) == (False, True)
    assert place < len(brackets) * (levels + 1)


@pytest.mark.parametrize(
    "cuts", [[], [json_object.MAX_BYTES - 1], [json_object.MAX_BYTES], list(range(0, 300_000, 7))], ids=len
)
@pytest.mark.parametrize("inside", [" ", '"a', "1"])
def test_what_is_too_large(inside: str, cuts: list[int]) -> None:
    text = "{" + inside * 300_000
    assert scanned(text[:300_000], cuts)[1:] == (True, json_object.MAX_BYTES)
