"""The model against transformers: every architecture, in chunks, through scattered blocks."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kernels.ops import REFERENCE
from tests.common import hf_models
from tests.paged import PagedSequences

LENGTHS = (1, 17, 45)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _prompts(vocab_size: int, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("name", list(hf_models.CONFIGS))
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    theirs = hf_models.save(name, tmp_path)
    prompts = _prompts(theirs.config.vocab_size)
    ours = PagedSequences(hf_models.load_ours(tmp_path), REFERENCE, prompts, room=8, block_size=4)
    forced = torch.randint(3, 500, (3, 4), generator=torch.Generator().manual_seed(2))
    logits = [ours.prefill(chunk=7), *(ours.step(tokens) for tokens in forced.T)]
    with torch.inference_mode():
        for row, prompt in enumerate(prompts):
            expected = theirs(torch.tensor([prompt + forced[row].tolist()])).logits[0, len(prompt) - 1 :]
            torch.testing.assert_close(torch.stack([step[row] for step in logits]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("name", list(hf_models.CONFIGS))
def test_greedy_tokens_equal_transformers(name: str, chunk: int | None, tmp_path: Path) -> None:
    theirs = hf_models.save(name, tmp_path)
    prompts = _prompts(theirs.config.vocab_size)
    expected = hf_models.greedy(theirs, prompts, 12)
    assert len({token for answer in expected for token in answer}) > 6
    ours = PagedSequences(hf_models.load_ours(tmp_path), REFERENCE, prompts, room=12, block_size=8)
    assert ours.generate(12, chunk) == expected


def test_embedded_model_greedy_equals_transformers(embedded: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32)
    prompts = _prompts(theirs.config.vocab_size, (1, 9, 33, 130))
    expected = hf_models.greedy(theirs, prompts, 12)
    model = hf_models.load_ours(embedded)
    assert PagedSequences(model, REFERENCE, prompts, room=12).generate(12) == expected
    assert PagedSequences(model, REFERENCE, prompts, room=12, block_size=2).generate(12, chunk=32) == expected


def test_bfloat16_logits_are_near_transformers(embedded: Path) -> None:
    """Both round to 8 bits, at different places. Tolerance: the difference's standard deviation is at most 6 % of the
    logits' own, and ours is at most half as far again from float32 as transformers' is (each differs by 2 to 5 %, and
    by how much depends on the processor)."""
    prompts = _prompts(49152, (1, 9, 33, 5, 20, 50))
    ours = PagedSequences(hf_models.load_ours(embedded, "bfloat16"), REFERENCE, prompts, room=0).prefill().float()
    with torch.inference_mode():
        theirs, exact = (
            torch.cat([model(torch.tensor([prompt])).logits[:, -1].float() for prompt in prompts])
            for model in (
                AutoModelForCausalLM.from_pretrained(embedded, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)
            )
        )
    spread = exact.std(dim=-1)
    assert ((ours - theirs).std(dim=-1) / spread).max() < 0.06
    assert (ours - exact).std() < 1.5 * (theirs - exact).std()
