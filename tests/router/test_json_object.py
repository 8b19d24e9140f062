import json

import pytest

from router import json_object
from router.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{}", {}),
        ('{"b": 1, "a": [1.0, -2, true, null, "é", {}]}', {"b": 1, "a": [1.0, -2, True, None, "é", {}]}),
        ('{"far": 9007199254740993, "small": 1e-400, "smile": "\\ud83d\\ude42"}', None),
        ('{"a":' + "[" * 63 + "]" * 63 + "}", None),
        ('{"a": "' + "é" * 131_067 + '"}', None),
    ],
    ids=[
        "empty",
        "every kind",
        "numbers of any size, a surrogate pair",
        "as deep as may be",
        "long",
    ],
)
def test_values_come_as_they_were_written(text: str, value: object) -> None:
    expected = json.loads(text) if value is None else value
    parsed = json_object.parse("tools", text)
    assert json.dumps(parsed) == json.dumps(expected)  # kinds of numbers and the order of names, too


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("{'a': 1}", "cannot be read as JSON"),
        ('{"a": 1} x', "cannot be read as JSON"),
        ("null", "must be a JSON object"),
        ("[{}]", "must be a JSON object"),
        ('"{}"', "must be a JSON object"),
        ('{"a": NaN}', "no numbers of it"),
        ('{"a": [-Infinity]}', "no numbers of it"),
        ('{"a": {"b": 1e999}}', "no numbers of it"),
        ('{"a": ' + "9" * 5_000 + "}", "cannot be read as JSON"),
        ('{"a": "\\ud83d"}', "has half of a UTF-16 surrogate pair"),
        ('{"\\udc00": 1}', "has half of a UTF-16 surrogate pair"),
        ('{"a":' + "[" * 64 + "]" * 64 + "}", "is nested deeper than 64 levels"),
        ('{"a":' * 40_000 + "1" + "}" * 40_000, "is nested deeper than 64 levels"),
        ('{"a": "' + "é" * 131_072 + '"}', "has 262153 bytes; at most 262144 are allowed"),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_object_or_cannot_go_on_is_refused(text: str, problem: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        json_object.parse("chat.tools[3]", text)
    assert refused.value.message.startswith("chat.tools[3]: ")
    assert problem in refused.value.message
