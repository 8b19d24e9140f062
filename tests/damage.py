"""What can happen to files: bytes cut, changed and put in, and JSON with values that nobody wrote."""

from typing import Any

from hypothesis import strategies as st

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([2**31, 2**63, 10**30, -(10**30), 0.5, 1e300, float("nan"), float("inf"), float("-inf")])
    | st.sampled_from(["", "x", "5", "../x", "/", "\0", "default", "llama3"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "name", "x"]), inner, max_size=3)
    ),
    max_leaves=4,
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content`, cut short, or with some bytes changed; lengths and counts (8 bytes) to extremes among them."""
    made = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(made) - 1, 0)))
        kind = draw(st.sampled_from(["cut", "byte", "count", "insert", "drop"]))
        if kind == "cut":
            del made[at:]
        elif kind == "byte":
            made[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "count":
            number = draw(
                st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1])
            )
            made[at : at + 8] = number.to_bytes(8, "little")
        elif kind == "insert":
            made[at:at] = draw(st.binary(max_size=9))
        else:
            del made[at : at + draw(st.integers(1, 9))]
    return bytes(made)


@st.composite
def altered(draw: st.DrawFn, document: Any) -> Any:
    """A JSON document with a value somewhere in it changed, or left out."""
    if isinstance(document, dict) and document and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(document)))
        rest = {name: value for name, value in document.items() if name != key}
        return rest if not draw(st.integers(0, 4)) else rest | {key: draw(altered(document[key]))}
    if isinstance(document, list) and document and draw(st.integers(0, 3)):
        place = draw(st.integers(0, len(document) - 1))
        return [*document[:place], draw(altered(document[place])), *document[place + 1 :]]
    return draw(JSON)
