import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from router.vocabulary import token_bytes
from router.vocabulary.detokenizer import Detokenizer
from tests.router import models

BYTE_LEVEL = models.byte_level()
BYTE_FALLBACK = models.byte_fallback()
METASPACE = models.metaspace()
NAMES = ["byte_level", "byte_fallback", "metaspace"]


def in_pieces(tokenizer: Tokenizer, ids: list[int], cuts: random.Random, special_tokens: bool) -> list[str]:
    known = token_bytes.read(tokenizer, models.VOCAB_SIZE)
    table = known.table if special_tokens else known.without_special()
    detokenizer = Detokenizer(table, known.strip_leading_space, known.opening)
    pieces = []
    while ids:
        count = cuts.randint(1, 4)
        pieces.append(detokenizer.feed(ids[:count]))
        ids = ids[count:]
    return [*pieces, detokenizer.finish()]


@given(st.lists(st.integers(0, models.VOCAB_SIZE - 1)), st.randoms(use_true_random=False), st.booleans())
@settings(deadline=None)
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, METASPACE], ids=["byte_level", "metaspace"])
def test_any_tokens_are_spelled_as_the_tokenizer_does(
    tokenizer: Tokenizer, ids: list[int], cuts: random.Random, special_tokens: bool
) -> None:
    ids = [token for token in ids if token < tokenizer.get_vocab_size()]
    pieces = in_pieces(tokenizer, ids, cuts, special_tokens)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=not special_tokens)


def test_the_first_token_of_a_metaspace_tokenizer_loses_all_its_spaces() -> None:
    ids = [models.token_id(METASPACE, token) for token in ("\u2581" * 3, "\u2581", "x\u2581")]
    assert "".join(in_pieces(METASPACE, ids, random.Random(1), special_tokens=False)) == METASPACE.decode(ids) == " x "


@given(st.text(), st.randoms(use_true_random=False))
@settings(deadline=None)
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK, METASPACE], ids=NAMES)
def test_pieces_of_a_text_make_the_text(tokenizer: Tokenizer, text: str, cuts: random.Random) -> None:
    ids = tokenizer.encode(text).ids
    pieces = in_pieces(tokenizer, ids, cuts, special_tokens=True)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=False)
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


def test_a_character_is_held_back_until_it_is_whole() -> None:
    known = token_bytes.read(BYTE_FALLBACK, models.VOCAB_SIZE)
    detokenizer = Detokenizer(known.table, known.strip_leading_space, known.opening)
    ids = [models.token_id(BYTE_FALLBACK, f"<0x{byte:02X}>") for byte in "🙂".encode()]
    assert [detokenizer.feed([token]) for token in ids] == ["", "", "", "🙂"]
    assert detokenizer.feed(ids[:2]) == ""
    assert detokenizer.finish() == "\ufffd"


@given(st.lists(st.integers(0, models.VOCAB_SIZE - 1)), st.lists(st.integers(0, 40), max_size=4))
@settings(deadline=None)
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK, METASPACE], ids=NAMES)
def test_a_sign_stands_for_a_token_and_between_others(tokenizer: Tokenizer, ids: list[int], cuts: list[int]) -> None:
    known = token_bytes.read(tokenizer, models.VOCAB_SIZE)
    sign, special = "\ud800", 0
    ids = [special if token % 7 == 0 else token for token in ids]
    detokenizer = Detokenizer(known.without_special(), known.strip_leading_space, known.opening, {special: sign})
    edges = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    pieces = [detokenizer.feed(ids[begin:end]) for begin, end in pairwise(edges)] + [detokenizer.finish()]

    between: list[list[int]] = [[]]
    for token in ids:
        between.append([]) if token == special else between[-1].append(token)
    plain = Detokenizer(known.without_special(), known.strip_leading_space, known.opening)
    assert "".join(pieces) == sign.join(plain.feed(tokens) + plain.finish() for tokens in between)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK, METASPACE], ids=NAMES)
def test_one_token_at_a_time_also_behind_some_that_have_no_text(tokenizer: Tokenizer) -> None:
    known = token_bytes.read(tokenizer, models.VOCAB_SIZE)
    silent, sign = 0, "\ud800"
    spoken = tokenizer.encode(" the quick é🙂 fox the").ids
    ids = [silent, silent, *spoken, silent, *spoken]
    detokenizer = Detokenizer(known.without_special(), known.strip_leading_space, known.opening)
    pieces = [detokenizer.feed([token]) for token in ids] + [detokenizer.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)
    signed = Detokenizer(known.without_special(), known.strip_leading_space, known.opening, {silent: sign})
    pieces = [signed.feed([token]) for token in [*spoken, silent, *spoken]] + [signed.finish()]
    assert "".join(pieces).split(sign)[0] == tokenizer.decode(spoken)
    assert "".join(pieces).replace(sign, "") == tokenizer.decode(spoken + spoken)


def test_a_leading_space_goes_also_behind_a_token_without_text() -> None:
    detokenizer = Detokenizer([b"", b" the"], strip_leading_space=True)
    assert [detokenizer.feed([token]) for token in (0, 1, 1)] == ["", "the", " the"]


def test_an_added_token_keeps_the_space_that_the_normalizer_makes_a_part_of_it() -> None:
    tokenizer = models.byte_fallback()
    tokenizer.add_tokens(["<tool>"])  # as transformers adds tokens that are not special: they are normalized
    ids = tokenizer.encode("the <tool> fox").ids
    pieces = in_pieces(tokenizer, ids, random.Random(1), special_tokens=True)
    assert "".join(pieces) == tokenizer.decode(ids) == "the <tool> fox"


def test_an_unknown_decoder_is_refused_by_name() -> None:
    tokenizer = models.byte_level()
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(token_bytes.UnsupportedTokenizer, match="WordPiece"):
        token_bytes.read(tokenizer, models.VOCAB_SIZE)
