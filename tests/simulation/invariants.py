"""What must hold: of each worker after every turn, of every answer and all KV at any time, and of all once nothing is
left to do. This is where the simulation looks into the parts."""

from collections.abc import Iterable

import grpc
import torch

from common.sampling.special_sampling import TokenCounts
from decode_worker.engine import Engine as DecodeEngine
from prefill_worker.engine import Engine as PrefillEngine
from router.dispatch.request import Request, State
from tests.simulation.host import DecodeHost, Host, PrefillHost
from tests.simulation.link import Link
from tests.simulation.reference import Reference
from tests.simulation.router_side import RouterSide
from twostroke.v1 import worker_pb2 as pb

_MOST_NOISE = 1e-3  # of a log-probability


def blocks_add_up(host: Host) -> None:
    """Each block is in use, cached or free; what is promised is there; no batch is too large."""
    blocks = host.parts.blocks
    assert blocks.free_count + blocks.cached_count + blocks.in_use_count == blocks.num_blocks, host.address
    if isinstance(host, DecodeHost):
        scheduler = host.engine._scheduler
        promised = sum(sequence.promised for sequence in scheduler._sequences.values())
        assert promised == scheduler.promised <= blocks.available, f"{host.address} promised too much"
        assert scheduler.count <= host.parts.hello.max_batch, f"{host.address} took too many"


def hashes_tell_the_truth(host: Host, reference: Reference) -> None:
    """A block that can be found holds the KV that its hash stands for."""
    found = host.parts.blocks._by_hash
    if not found:
        return
    held = host.parts.pool.tensor[list(found.values())]
    true = torch.stack([reference.kv[block_hash] for block_hash in found])
    assert torch.allclose(held, true, atol=1e-4, rtol=1e-3), f"{host.address} has a hash on a block of other content"


def answers_are_right(requests: Iterable[Request], reference: Reference) -> None:
    """As far as they got, token for token what one worker alone answers; finished ones to the end."""
    for request in requests:
        answer = reference.answer(request)
        wanted = answer.tokens if request.state is State.FINISHED else answer.tokens[: len(request.output)]
        assert request.output == wanted, f"request {request.id}, choice {request.index}: another answer than alone"
        if request.wants_logprobs:
            assert len(request.logprobs) == len(request.output), f"request {request.id}: not one for each token"
            for packed, alone in zip(request.logprobs, answer.logprobs, strict=False):
                got = pb.Logprobs.FromString(packed)
                assert abs(got.logprob - alone.logprob) < _MOST_NOISE, f"request {request.id}: another log-probability"
                assert len(got.top_ids) == request.sampling.logprobs


def accounts_are_possible(link: Link) -> None:
    """A router does not think that a worker has less than nothing to do for it."""
    assert min(link.worker.pending_tokens, link.worker._unanswered_blocks) >= 0, f"{link.host.address}'s account"


def nobody_failed_without_need(requests: Iterable[Request], patient: bool) -> None:
    for request in requests:
        if request.failure is not None:
            assert not patient, f"request {request.id} failed: {request.failure}"
            assert request.failure.code is grpc.StatusCode.UNAVAILABLE, f"request {request.id}: {request.failure}"


def nothing_is_held(host: Host) -> None:
    """By a worker without work."""
    where = host.address
    assert host.parts.blocks.in_use_count == 0, f"{where} holds {host.parts.blocks.in_use_count} blocks"
    if isinstance(host, DecodeHost):
        _nothing_decodes(host.engine, where)
    elif isinstance(host, PrefillHost):
        _nothing_prefills(host.engine, where)


def _nothing_prefills(engine: PrefillEngine, where: str) -> None:
    scheduler = engine._scheduler
    held = (scheduler._running, scheduler._waiting, scheduler._computing, engine._leases._leases)
    assert not any(held), f"{where} holds prompts: {held}"
    _all_free(engine._loop._runner._counts, where)


def _nothing_decodes(engine: DecodeEngine, where: str) -> None:
    prompts, own, puller = engine._own_prompts._loop.scheduler, engine._own_prompts._sequences, engine._puller
    held = (own, prompts._running, prompts._waiting, prompts._computing, engine._uncompiled, engine._claims._claims)
    assert not any(held), f"{where} holds prompts or claims: {held}"
    assert not (engine._scheduler.count or engine._scheduler.promised or puller._waiting or puller._under_way), where
    runner = engine._loop._runner
    batch = runner.batch
    rows = (batch.sequences, batch._row_of, batch._device_row, batch._device_blocks)
    assert not any((*rows, runner._slots, runner._with_logprobs, runner._with_grammar)), f"{where} holds rows"
    _all_free(runner._counts, where)


def _all_free(counts: TokenCounts, where: str) -> None:
    assert len(counts._free) == len(counts._sampled), f"{where} counts tokens of sequences that are gone"


def router_is_empty(router: RouterSide) -> None:
    dispatcher = router.dispatcher
    assert (dispatcher.queued, dispatcher.running, dispatcher.queued_prompt_tokens) == (0, 0, 0)


def accounts_are_even(link: Link) -> None:
    """What a router thinks of a worker without work is how it is: nothing to do, all its blocks, its very cache."""
    worker, blocks = link.worker, link.host.parts.blocks
    owed = (worker.attempts, worker.decoding, worker.pending_tokens, worker._unanswered_blocks)
    assert not any((*owed, worker._others, worker._others_tokens)), f"{worker.address} is thought to be busy: {owed}"
    assert not (worker.cache._under_way or worker.cache._computed_here), f"{worker.address} is thought to compute"
    assert worker.cache.published == set(blocks.hashes()), f"{worker.address} is thought to have another cache"
    assert worker._room == blocks.num_blocks, f"{worker.address} is thought to have {worker._room} blocks"
