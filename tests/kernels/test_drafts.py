"""The reference of speculative decoding against its definition, told in another way."""

import random

import pytest
import torch

from kernels.drafts import LONGEST_MATCH, accept, draft

COUNT, BLOCK = 4, 4


def drafts_behind(text: list[int], count: int) -> list[int]:
    """What `draft` should find."""
    for longest in range(min(LONGEST_MATCH, len(text)), 0, -1):
        for end in range(len(text) - 1, longest - 1, -1):
            if text[end - longest : end] == text[-longest:]:
                drafted = list(text[end:])
                while len(drafted) < count:
                    drafted += text[end:]
                return drafted[:count]
    return [text[-1]] * count


@pytest.mark.parametrize("vocab", [1, 2, 4, 50])
def test_what_followed_the_last_time_is_drafted(vocab: int) -> None:
    rng = random.Random(vocab)
    texts = [[rng.randrange(vocab) for _ in range(rng.randrange(1, 40))] for _ in range(60)]
    history = torch.full((len(texts), 50), -7, dtype=torch.int32)
    for row, text in enumerate(texts):
        history[row, : len(text)] = torch.tensor(text)
    lengths = torch.tensor([len(text) - 1 for text in texts], dtype=torch.int32)
    limits = lengths + torch.tensor([rng.randrange(1, 8) for _ in texts], dtype=torch.int32)
    tables = torch.randperm(len(texts) * 13).int().view(len(texts), 13)
    rows = draft(lengths, limits, history, tables, COUNT, BLOCK)
    start = 0
    for row, text in enumerate(texts):
        length = len(text) - 1
        query_len = min(COUNT + 1, int(limits[row]) - length)
        mine = slice(start, start + query_len)
        start += query_len
        assert rows.tokens[mine].tolist() == [text[-1], *drafts_behind(text, COUNT)][:query_len]
        assert rows.positions[mine].tolist() == list(range(length, length + query_len))
        places = range(length, length + query_len)
        assert rows.slots[mine].tolist() == [int(tables[row, at // BLOCK]) * BLOCK + at % BLOCK for at in places]
        assert rows.owners[mine].tolist() == [row] * query_len
        assert rows.attention.query_lens[row] == query_len
        assert rows.attention.kv_lens[row] == rows.attention.seq_lens[row] == length + query_len
        assert rows.attention.cu_query_lens[row + 1] == start
    assert len(rows.tokens) == start


def test_drafts_are_kept_up_to_the_first_that_was_not_drawn() -> None:
    history = torch.zeros((4, 20), dtype=torch.int32)
    history[:3, :6] = torch.tensor([1, 2, 3, 1, 2, 3])
    lengths = torch.tensor([5, 5, 5, -1], dtype=torch.int32)
    limits = torch.tensor([20, 20, 8, 0], dtype=torch.int32)
    tokens = torch.tensor([3, 3, 3, 9], dtype=torch.int32)
    rows = draft(lengths, limits, history, torch.zeros((4, 5), dtype=torch.int32), COUNT, BLOCK)
    assert rows.tokens.tolist() == [3, 1, 2, 3, 1, 3, 1, 2, 3, 1, 3, 1, 2]
    drawn = torch.tensor([1, 2, 7, 1, 2, 1, 2, 3, 1, 2, 1, 2, 3], dtype=torch.int32)
    kept = accept(tokens, lengths, history, rows, drawn, COUNT)
    assert kept.tolist() == [[1, 2, 7, -1, -1], [1, 2, 3, 1, 2], [1, 2, 3, -1, -1], [-1] * 5]
    assert tokens.tolist() == [7, 2, 3, 9]
    assert lengths.tolist() == [8, 10, 8, -1]
    assert history[0, 6:10].tolist() == [1, 2, 7, 0]
    assert history[1, 6:12].tolist() == [1, 2, 3, 1, 2, 0]
    assert not history[3].any()
