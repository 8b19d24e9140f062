"""Prompts of many lengths, cut from this repository's licence: real text, and no other file is needed."""

import random
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from common.model.model_files import EMBEDDED, resolve


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(resolve(EMBEDDED) / "tokenizer.json"))


@cache
def licence_tokens() -> tuple[int, ...]:
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    return tuple(tokenizer().encode(text).ids)


def prompts(lengths: tuple[int, ...], seed: int) -> list[list[int]]:
    """One prompt of each length; they begin at different places."""
    random_ = random.Random(seed)
    tokens = licence_tokens()
    starts = random_.sample(range(len(tokens) - max(lengths)), len(lengths))
    return [list(tokens[start : start + length]) for start, length in zip(starts, lengths, strict=True)]
