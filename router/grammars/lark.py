"""Texts in grammars that are written in Lark."""

import json


def text(value: str) -> str:
    """The text as a string of Lark's: as one of JSON's, in which llguidance does not take U+007F as it is."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
