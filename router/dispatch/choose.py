"""Chooses the pair of workers for a request, by load and by how much of its prefix they have cached.

Between workers that are equal in these, the one with the smaller cache is taken: less is evicted there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from router.cluster.worker import Worker
from router.cluster.workers import DECODE, PREFILL, Role, Workers
from router.dispatch.request import Request

# How many blocks of free room a cached block, which a decode worker need not pull, is worth. If it were one, the
# emptier worker would nearly always win, since pulls are quick; every prefix would end up in every pool, and evict
# others there. A block that a decode worker has yet to compute for earlier prompts weighs as much the other way: a
# waiting prompt delays those after it by about as much as four running sequences of its length do.
HIT_WORTH = 4


# The best prefill worker for a prompt among those that some decode worker can read, None while they are all busy. By
# the instances that it can read (`Worker.reads`), which are the same for all decode workers of a host.
PrefillOf: TypeAlias = Mapping[frozenset[str], Worker | None]


@dataclass(frozen=True, slots=True)
class Pair:
    """Without a prefill worker the decode worker prefills, too. Without a decode worker the first token is the only
    one."""

    prefill: Worker | None
    decode: Worker | None


@dataclass(frozen=True, slots=True)
class Missing:
    """No worker can take the request now."""

    role: Role  # that it waits for
    workers: list[Worker]  # of this role that might take it later
    tokens: int  # that such a worker must be able to hold


def pair(request: Request, workers: Workers, headroom: int) -> Pair | Missing:
    """Chooses the workers for an attempt that reserves blocks for `headroom` tokens of output."""
    prefills, decodes = workers.of(PREFILL), workers.paired()
    if request.prompt.grammar:
        prefills, decodes = _guiding(prefills, decodes)
    if request.remaining <= 1 and prefills:
        return _for_one_token(request, prefills, decodes, headroom)
    able = with_room(request, decodes, request.length + headroom)
    if not able:
        return Missing(DECODE, decodes, request.max_length)
    prefill_of = best_prefills(request, prefills, able)
    waiting = {reads for reads, prefill in prefill_of.items() if prefill is None}
    able = [worker for worker in able if worker.reads not in waiting or _computes(worker, request)]
    if not able:
        return Missing(PREFILL, prefills, request.length + 1)
    decode = best_decode(request, able, prefill_of)
    return Pair(None if decode.prefills(request) else prefill_of.get(decode.reads), decode)


def _guiding(prefills: list[Worker], decodes: list[Worker]) -> tuple[list[Worker], list[Worker]]:
    """The workers that support grammars; of the decode workers, only those for which such a prompt can be prefilled."""
    prefills = [worker for worker in prefills if worker.hello.guides]
    theirs = {worker.instance for worker in prefills}
    return prefills, [
        worker for worker in decodes if worker.hello.guides and (worker.can_prefill or worker.reads & theirs)
    ]


def _for_one_token(
    request: Request, prefills: list[Worker], decodes: Iterable[Worker], headroom: int
) -> Pair | Missing:
    """The first token is the only one, so there is nothing to hand over. A decode worker is needed only if it prefills,
    while all prefill workers are busy."""
    prefill = best_prefill(request, prefills)
    if prefill is not None:
        return Pair(prefill, None)
    able = with_room(request, decodes, request.length + headroom)
    able = [worker for worker in able if _computes(worker, request)]
    if not able:
        return Missing(PREFILL, prefills, request.length + 1)
    return Pair(None, best_decode(request, able, {}))


def _computes(decode: Worker, request: Request) -> bool:
    """Whether the decode worker prefills the prompt while all prefill workers are busy."""
    return decode.prefills(request) or decode.helps_out(request)


def best_prefill(request: Request, workers: Iterable[Worker]) -> Worker | None:
    """The one with the fewest tokens to compute until this prompt is done; None while all are busy."""
    trusted = _trusted(worker for worker in workers if worker.can_hold(request.length + 1))
    able = [worker for worker in trusted if worker.accepts_prefill]

    def cost(worker: Worker) -> tuple[bool, int, int]:
        tokens = worker.tokens_ahead + worker.missing_tokens(request)
        return worker.instance in request.avoid, tokens, len(worker.cache)

    return min(able, key=cost, default=None)


def best_prefills(request: Request, prefills: Iterable[Worker], decodes: Iterable[Worker]) -> PrefillOf:
    """The best prefill worker for each set of prefill workers that some of the decode workers can read."""
    prefills = list(prefills)
    instances = {worker.instance for worker in prefills}
    return {
        reads: best_prefill(request, [worker for worker in prefills if worker.instance in reads])
        for reads in {worker.reads for worker in decodes}
        if reads & instances
    }


def with_room(request: Request, workers: Iterable[Worker], tokens: int) -> list[Worker]:
    """The decode workers with room for a sequence of `tokens` tokens."""
    trusted = _trusted(worker for worker in workers if worker.can_hold(request.max_length))
    return [worker for worker in trusted if worker.has_room(request, tokens)]


def best_decode(request: Request, able: list[Worker], prefill_of: PrefillOf) -> Worker:
    """The one with the most room. Cached blocks add `HIT_WORTH` blocks each, blocks that it has yet to prefill subtract
    as many. Those come last on which the request failed, then those whose prefill worker is busy, paused, or failed
    it."""

    def is_doubtful(prefill: Worker | None) -> bool:
        return prefill is None or prefill.circuit.paused or prefill.instance in request.avoid

    doubtful = {reads for reads, prefill in prefill_of.items() if is_doubtful(prefill)}

    def cost(worker: Worker) -> tuple[bool, bool, int, int]:
        hits = worker.cache.hits(request.block_hashes, computed_here=worker.prefills(request))
        saved = hits - worker.blocks(worker.pending_tokens)
        avoided = worker.instance in request.avoid
        return avoided, worker.reads in doubtful, -worker.room - HIT_WORTH * saved, len(worker.cache)

    return min(able, key=cost)


def _trusted(workers: Iterable[Worker]) -> list[Worker]:
    """The workers that are not paused by their circuit breakers; all of them if all are: then it is better to try than
    to wait for the pause to end."""
    able = list(workers)
    return [worker for worker in able if not worker.circuit.paused] or able
