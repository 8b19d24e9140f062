"""The engine of both workers, in one process on one GPU, says what transformers says."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.in_process import InProcess, spec
from benchmarks.parts import LoadedModel, load_model, worker_parts
from common.sampling.parameters import SamplingParams
from common.sequence import SequenceSpec
from decode_worker.pace import Pace
from tests import rounded_kv
from tests.gpu import tiny_models
from tests.gpu.greedy import DEVICE, LENGTHS, assert_greedy, assert_same_draws, gaps, reference, text
from tests.one_worker import OneWorker, always_draft

OUTPUT_TOKENS = 64
SOME_LENGTHS = (1, 7, 16, 33, 64, 100, 129, 200, 257, 400)

# How far below the likeliest token's logit, in float32, a token chosen in bfloat16 may lie. Logits of this model reach
# 20 to 30; bfloat16 keeps 8 bits of each, and errors of 30 layers add up.
BF16_GAP = 1.0
BF16_SAME = 0.9  # share of tokens that are the likeliest all the same


@dataclass(frozen=True)
class Engines:
    """A model in one dtype, and the makings of engines with small or large pools."""

    loaded: LoadedModel
    directory: Path

    def engine(
        self, *, blocks: int, block_size: int = 16, graphs: bool = True, kv: str = "auto", **settings: int
    ) -> InProcess:
        engine = InProcess(
            worker_parts(self.loaded, 8192 // block_size, block_size, kv),
            worker_parts(self.loaded, blocks, block_size, kv),
            max_batch=settings.get("max_batch", 32),
            max_batch_tokens=settings.get("max_batch_tokens", 2048),
            headroom_tokens=settings.get("headroom_tokens", 1024),
            drafts=settings.get("drafts", 0),
        )
        if not graphs:
            engine.decode_runner.graphs = engine.prefill_runner.graphs = None
        return engine


def load(directory: Path, dtype: str, max_length: int) -> Engines:
    return Engines(load_model(directory, dtype, DEVICE, dummy=False, max_length=max_length), directory)


@pytest.fixture(scope="module")
def smol(smollm2: Path) -> Engines:
    return load(smollm2, "float32", 2048)


@pytest.fixture(scope="module", params=list(tiny_models.MODELS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    yield load(tiny_models.write(request.param, tmp_path_factory.mktemp(request.param)), "float32", 1024)
    reference.cache_clear()


def noise(lengths: Sequence[int]) -> list[list[int]]:
    draw = random.Random(0)
    return [draw.choices(range(tiny_models.VOCAB_SIZE), k=length) for length in lengths]


def greedy(asked: Sequence[Sequence[int]], count: int, block_size: int = 16) -> list[SequenceSpec]:
    return [spec(tokens, len(tokens) + count, temperature=0, block_size=block_size) for tokens in asked]


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_32_prompts_at_once(smol: Engines, graphs: bool) -> None:
    asked = text(smol.directory, LENGTHS)
    assert len(asked) == 32
    engine = smol.engine(blocks=1024, graphs=graphs)
    assert_greedy(smol.directory, asked, engine.run(greedy(asked, OUTPUT_TOKENS)), OUTPUT_TOKENS)
    assert engine.blocks_home()


def test_more_prompts_than_a_batch_holds(smol: Engines) -> None:
    """And some of them ask for what is sampled outside of graphs."""
    asked = text(smol.directory, [1 + index % 11 for index in range(150)])
    outputs = smol.engine(blocks=1024, max_batch_tokens=256).run(greedy(asked, 4))
    assert_greedy(smol.directory, asked, outputs, 4)
    special: tuple[dict[str, Any], ...] = ({}, {"logprobs": 2}, {"logit_bias": ((5, 0.0),)})
    mixed = [
        replace(wanted, sampling=replace(wanted.sampling, **special[index % 3]))
        for index, wanted in enumerate(greedy(asked[:20], 4))
    ]
    assert smol.engine(blocks=1024, max_batch_tokens=256).run(mixed) == outputs[:20]


@pytest.mark.parametrize("block_size", [4, 64])
def test_other_block_sizes(smol: Engines, block_size: int) -> None:
    asked = text(smol.directory, SOME_LENGTHS)
    engine = smol.engine(blocks=4096 // block_size, block_size=block_size)
    assert_greedy(smol.directory, asked, engine.run(greedy(asked, 32, block_size)), 32)


def test_chunks_of_32(smol: Engines) -> None:
    asked = text(smol.directory, SOME_LENGTHS)
    engine = smol.engine(blocks=512, max_batch_tokens=32)
    assert_greedy(smol.directory, asked, engine.run(greedy(asked, 32)), 32)


def test_prefix_hits_on_both_sides(smol: Engines) -> None:
    (shared,) = text(smol.directory, (203,))
    asked = [shared + tail for tail in text(smol.directory, (1, 5, 16, 40), seed=1)]
    engine = smol.engine(blocks=512)
    for _ in range(2):
        assert_greedy(smol.directory, asked, engine.run(greedy(asked, 32)), 32)
    assert engine.blocks_home()


def test_preemption(smol: Engines) -> None:
    asked = text(smol.directory, SOME_LENGTHS)
    engine = smol.engine(blocks=100, headroom_tokens=1)
    assert_greedy(smol.directory, asked, engine.run(greedy(asked, 48)), 48)
    assert engine.preemptions > 0
    assert engine.blocks_home()


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> int:
    """How many are behind each token, in every step that may have some."""
    always_draft(monkeypatch)
    return 4


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_drafts(smol: Engines, graphs: bool, drafts: int) -> None:
    """The second time with prefix hits on both sides."""
    asked = text(smol.directory, LENGTHS)
    engine = smol.engine(blocks=1024, graphs=graphs, drafts=drafts)
    for _ in range(2):
        assert_greedy(smol.directory, asked, engine.run(greedy(asked, OUTPUT_TOKENS)), OUTPUT_TOKENS)
    assert engine.blocks_home()


def test_drafts_of_many_sequences_with_preemption(smol: Engines, drafts: int) -> None:
    asked = text(smol.directory, [1 + 7 * index for index in range(56)])
    engine = smol.engine(blocks=200, max_batch=64, headroom_tokens=1, drafts=drafts)
    assert_greedy(smol.directory, asked, engine.run(greedy(asked, 48)), 48)
    assert engine.preemptions > 0
    assert engine.blocks_home()


def test_drafts_beside_sequences_that_have_none(smol: Engines, drafts: int) -> None:
    asked = text(smol.directory, SOME_LENGTHS)
    specs = greedy(asked, 32)
    special = SamplingParams(temperature=0, logprobs=2, logit_bias=((5, 0.0),))
    specs[3] = replace(specs[3], sampling=special, max_length=len(asked[3]) + 9)
    outputs = smol.engine(blocks=512, drafts=drafts).run(specs)
    assert len(outputs[3]) == 9
    del asked[3], outputs[3]
    assert_greedy(smol.directory, asked, outputs, 32)


def test_drafts_do_not_change_what_is_sampled(smol: Engines, drafts: int) -> None:
    asked = text(smol.directory, (33,) * 16)
    specs = [spec(tokens, 33 + 32, temperature=0.8, seed=index) for index, tokens in enumerate(asked)]
    plain, drafted = (smol.engine(blocks=512, drafts=count).run(specs) for count in (0, drafts))
    for wanted, prompt, without, output in zip(specs, asked, plain, drafted, strict=True):
        assert_same_draws(smol.directory, prompt, wanted.sampling, without, output)


def test_every_architecture_with_drafts(tiny: Engines, drafts: int) -> None:
    asked = noise(SOME_LENGTHS)
    engine = tiny.engine(blocks=512, drafts=drafts)
    assert_greedy(tiny.directory, asked, engine.run(greedy(asked, 32)), 32)
    assert engine.blocks_home()


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("with_drafts", [False, True], ids=["", "drafts"])
def test_8_bit_kv(smol: Engines, graphs: bool, with_drafts: bool, drafts: int) -> None:
    """The second time with prefix hits on both sides; preempted, and in chunks."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no 8-bit floats")
    asked = text(smol.directory, SOME_LENGTHS)
    settings = {"headroom_tokens": 1, "max_batch_tokens": 256, "drafts": drafts * with_drafts}
    engine = smol.engine(blocks=34, graphs=graphs, kv="fp8", **settings)
    outputs = [engine.run(greedy(asked, 48)) for _ in range(2)]
    rounded_kv.assert_greedy(reference(smol.directory), asked * 2, [*outputs[0], *outputs[1]], 48)
    assert engine.preemptions > 0
    assert engine.blocks_home()


def test_a_seeded_sequence_is_the_same_alone_and_in_a_batch(smol: Engines) -> None:
    asked = text(smol.directory, (33,) * 16)
    specs = [spec(tokens, 33 + 32, temperature=0.8, seed=index) for index, tokens in enumerate(asked)]
    together = smol.engine(blocks=512).run(specs)
    for wanted, prompt, output in zip(specs[:4], asked, together, strict=False):
        alone = smol.engine(blocks=512).run([wanted])[0]
        assert_same_draws(smol.directory, prompt, wanted.sampling, alone, output)
    assert len({tuple(output) for output in together}) == 16


def test_no_request_waits_for_a_kernel_to_be_compiled(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch, drafts: int
) -> None:
    one = OneWorker(worker_parts(load(smollm2, "bfloat16", 512).loaded, 300), chunk_tokens=128, drafts=drafts)
    missing: list[str] = []
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda *, repr, **_: missing.append(repr))
    plain = greedy(noise([1, 5, 17, 90, 300]), 4)
    params = SamplingParams(temperature=0.7, top_k=5, presence_penalty=0.5, logit_bias=((7, 1.0),), logprobs=2)
    special = [replace(asked, sampling=params) for asked in plain]
    one.run(special[:1])
    one.run([*plain, *special])
    assert missing == []


@pytest.mark.parametrize("spare", [0.0, 1.0], ids=["launched at once", "when the step before is over"])
def test_when_steps_are_launched_changes_no_token(smol: Engines, monkeypatch: pytest.MonkeyPatch, spare: float) -> None:
    monkeypatch.setattr(Pace, "spare", lambda self, now: spare)
    asked = text(smol.directory, SOME_LENGTHS)
    one = OneWorker(worker_parts(smol.loaded, 256), chunk_tokens=100)
    assert_greedy(smol.directory, asked, one.run(greedy(asked, 32)), 32)


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("with_drafts", [False, True], ids=["", "drafts"])
def test_bfloat16_stays_close(smollm2: Path, graphs: bool, with_drafts: bool, drafts: int) -> None:
    engines = load(smollm2, "bfloat16", 2048)
    asked = text(smollm2, LENGTHS)
    engine = engines.engine(blocks=1024, graphs=graphs, drafts=drafts * with_drafts)
    outputs = engine.run(greedy(asked, OUTPUT_TOKENS))
    gap = torch.cat([gaps(smollm2, prompt, output) for prompt, output in zip(asked, outputs, strict=True)])
    assert gap.max() <= BF16_GAP
    assert (gap == 0).float().mean() >= BF16_SAME


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_every_architecture(tiny: Engines, graphs: bool) -> None:
    asked = noise(SOME_LENGTHS)
    engine = tiny.engine(blocks=512, graphs=graphs)
    assert_greedy(tiny.directory, asked, engine.run(greedy(asked, 32)), 32)
    assert engine.blocks_home()


def test_every_architecture_in_chunks(tiny: Engines) -> None:
    asked = noise(SOME_LENGTHS)
    engine = tiny.engine(blocks=512, max_batch_tokens=48)
    assert_greedy(tiny.directory, asked, engine.run(greedy(asked, 32)), 32)


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_every_architecture_on_a_worker_that_does_both(tiny: Engines, graphs: bool) -> None:
    """Steps and chunks of prompts are launched ahead of one another, on one pool that is too small for all."""
    asked = noise(SOME_LENGTHS)
    one = OneWorker(worker_parts(tiny.loaded, 56), chunk_tokens=48, graphs=graphs)
    assert_greedy(tiny.directory, asked, one.run(greedy(asked, 64), headroom_tokens=1), 64)
    assert one.preemptions > 0
