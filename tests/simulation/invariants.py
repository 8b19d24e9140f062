"""What must hold: of workers and routers at any time, and once nothing is left to do. This is where the simulation
looks into the parts."""

from collections.abc import Iterable

import grpc
import torch

from router.dispatch.request import Request, State
from tests.simulation.host import DecodeHost, Host, PrefillHost
from tests.simulation.link import Link
from tests.simulation.reference import Reference
from tests.simulation.router_side import RouterSide
from twostroke.v1 import worker_pb2 as pb

_MOST_NOISE = 1e-3  # of a log-probability


def blocks_add_up(host: Host) -> None:
    """Each block is in use, cached or free; what is promised is there; no batch is too large."""
    for pool in host.parts.caches:
        assert pool.free_count + pool.cached_count + pool.in_use_count == pool.num_blocks, host.address
    if isinstance(host, DecodeHost):
        scheduler = host.engine._scheduler
        promised = sum(sequence.promised for sequence in scheduler._sequences.values())
        assert promised == scheduler.promised <= host.parts.blocks.available, f"{host.address} promised what it has not"
        assert scheduler.count <= host.hello.max_batch, f"{host.address} took too many"


def hashes_are_true(host: Host, reference: Reference) -> None:
    """A block that can be found, in the pool or in host memory, holds the KV that its hash stands for."""
    tensors = [host.parts.pool.tensor] + ([host.memory.tensor] if host.memory is not None else [])
    for pool, tensor in zip(host.parts.caches, tensors, strict=True):
        found = pool._by_hash
        assert found.keys() <= reference.kv.keys(), f"{host.address} has a hash of tokens that nobody answers alone"
        if found:
            held = tensor[list(found.values())]
            true = torch.stack([reference.kv[block_hash] for block_hash in found])
            assert torch.allclose(held, true, atol=1e-4, rtol=1e-3), f"{host.address} has other KV behind a hash"


def answers_are_right(requests: Iterable[Request], reference: Reference) -> None:
    """As far as they got, token for token what one worker alone answers; finished ones to the end."""
    for request in requests:
        name, wanted = f"{request.id}, choice {request.index}", reference.tokens(request)
        until = None if request.state is State.FINISHED else len(request.output)
        assert request.output == wanted[:until], f"{name} has another answer than alone"
        if request.wants_logprobs:
            assert len(request.logprobs) == len(request.output), f"{name} has not one log-probability for each token"
            got = [pb.Logprobs.FromString(packed) for packed in request.logprobs]
            for one, alone in zip(got, reference.logprobs(request), strict=False):
                assert abs(one.logprob - alone.logprob) < _MOST_NOISE, f"{name} has other log-probabilities than alone"
                assert len(one.top_ids) == request.sampling.logprobs, f"{name} lacks likeliest tokens"


def callers_know_all(router: RouterSide) -> None:
    """What has become of a request that has ended, or has been ended by its caller, was told once, and in order."""
    assert not router.caller.has_settled
    for request in router.requests:
        name, told = f"{request.id}, choice {request.index}", router.caller.told[request.serial]
        if request.state is State.DROPPED:
            assert told == request.output[: len(told)], f"the caller of {name} was told something else"
        else:
            assert told == request.output, f"the caller of {name} was not told all of it"


def failures_are_due(requests: Iterable[Request], patient: bool) -> None:
    """Only a router that has lost its patience fails requests, and says that it is worth while to ask again."""
    for request in requests:
        if request.failure is not None:
            allowed = not patient and request.failure.code is grpc.StatusCode.UNAVAILABLE
            assert allowed, f"{request.id}, choice {request.index} failed: {request.failure}"


def account_is_possible(link: Link) -> None:
    """No worker has less than nothing to do."""
    worker = link.worker
    assert min(worker.pending_tokens, worker._unanswered_blocks) >= 0, f"{worker.address}'s account is overdrawn"


def nothing_is_held(host: Host) -> None:
    """By a worker without work."""
    held: list[object] = []
    if isinstance(host, PrefillHost):
        prompts, counts = host.engine._loop.scheduler, host.engine._loop._runner._counts
        held += [host.engine._leases._leases]
    else:
        assert isinstance(host, DecodeHost)
        engine, runner = host.engine, host.engine._loop._runner
        prompts, counts = engine._own_prompts._loop.scheduler, runner._counts
        puller, batch = engine._puller, runner.batch
        held += [engine._scheduler._sequences, engine._own_prompts._sequences, engine._claims._claims]
        held += [engine._uncompiled, puller._waiting, puller._under_way]
        held += [runner._slots, runner._with_logprobs, runner._with_grammar]
        held += [batch.sequences, batch._row_of, batch._device_row, batch._device_blocks]
    held += [prompts._running, prompts._waiting, prompts._computing]
    assert not any(held), f"{host.address} still holds {[it for it in held if it]}"
    assert not any(pool.in_use_count for pool in host.parts.caches), f"{host.address} still holds blocks"
    assert len(counts._free) == len(counts._sampled), f"{host.address} still counts tokens"


def account_is_even(link: Link) -> None:
    """A router knows of a worker without work: that it has none, all its blocks, and what they cache."""
    worker, parts = link.worker, link.host.parts
    work = [worker.attempts, worker.decoding.requests, worker.decoding.rows, worker.pending_tokens]
    work += [worker._unanswered_blocks, worker._others, worker._others_tokens]
    work += [worker.cache._under_way, worker.cache._computed_here]
    assert not any(work), f"{worker.address} is thought to be at work"
    known = [worker.cache.published, worker.cache.in_host_memory][: len(parts.caches)]
    cached = [set(pool.hashes()) for pool in parts.caches]
    assert known == cached, f"{worker.address} is thought to have another cache"
    assert worker._room == parts.blocks.num_blocks, f"{worker.address} is thought to have {worker._room} blocks"
