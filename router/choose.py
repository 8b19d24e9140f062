"""Which pair of workers a request goes to: where least is left to do for it, counting what the caches there hold.

Between workers that are equal in this, the one whose cache holds less: it has less to lose.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from router.request import Request
from router.worker import Worker
from router.workers import DECODE, PREFILL, Role, Workers

# A block that decode need not pull is worth so many blocks of room. Pulls are quick, so the emptier worker would nearly
# always win if it were one, and every prefix would end up in every pool, where it drives out others. A block that is
# still to be computed there, for prompts that came before, weighs as much: a prompt that waits delays what comes after
# it by about as much as four running sequences of its length do.
HIT_WORTH = 4


# Of each set of prefill workers that are pairs with the same decode workers, by instance: the one for a prompt, or None
# while all of them have enough to do.
PrefillOf: TypeAlias = Mapping[frozenset[str], Worker | None]


@dataclass(frozen=True, slots=True)
class Pair:
    """Without a prefill worker decode computes the prompt, too; without a decode worker the first token is all."""

    prefill: Worker | None
    decode: Worker | None


@dataclass(frozen=True, slots=True)
class Missing:
    """None of `workers` takes the request now; whoever does must be able to hold so many tokens."""

    role: Role
    workers: list[Worker]
    tokens: int


def pair(request: Request, workers: Workers, headroom: int) -> Pair | Missing:
    """For a request with so many tokens of output to reserve room for."""
    prefills, decodes = workers.of(PREFILL), workers.paired()
    if request.prompt.grammar:
        prefills, decodes = _guiding(prefills, decodes)
    if request.remaining <= 1 and prefills:
        return _for_one_token(request, prefills, decodes, headroom)
    able = decode_workers(request, decodes, request.length + headroom)
    if not able:
        return Missing(DECODE, decodes, request.max_length)
    prefill_of = prefill_workers(request, prefills, able)
    waiting = {reads for reads, prefill in prefill_of.items() if prefill is None}
    able = [worker for worker in able if worker.reads not in waiting or _computes(worker, request)]
    if not able:
        return Missing(PREFILL, prefills, request.length + 1)
    decode = decode_worker(request, able, prefill_of)
    return Pair(None if decode.prefills(request) else prefill_of.get(decode.reads), decode)


def _guiding(prefills: list[Worker], decodes: list[Worker]) -> tuple[list[Worker], list[Worker]]:
    """Those that make output follow a grammar; of decode workers, those to which such a prompt can come."""
    prefills = [worker for worker in prefills if worker.hello.guides]
    theirs = {worker.instance for worker in prefills}
    return prefills, [
        worker for worker in decodes if worker.hello.guides and (worker.can_prefill or worker.reads & theirs)
    ]


def _for_one_token(
    request: Request, prefills: list[Worker], decodes: Iterable[Worker], headroom: int
) -> Pair | Missing:
    """Nothing is to be handed over: a decode worker is needed only where no prefill worker has time for the prompt."""
    prefill = prefill_worker(request, prefills)
    if prefill is not None:
        return Pair(prefill, None)
    able = decode_workers(request, decodes, request.length + headroom)
    able = [worker for worker in able if _computes(worker, request)]
    if not able:
        return Missing(PREFILL, prefills, request.length + 1)
    return Pair(None, decode_worker(request, able, {}))


def _computes(decode: Worker, request: Request) -> bool:
    """Whether it would prefill the prompt while all prefill workers are busy."""
    return decode.prefills(request) or decode.helps_out(request)


def prefill_worker(request: Request, workers: Iterable[Worker]) -> Worker | None:
    """The one with the fewest tokens to compute until this prompt is done; None while all have enough to do."""
    trusted = _trusted(worker for worker in workers if worker.can_hold(request.length + 1))
    able = [worker for worker in trusted if worker.accepts_prefill]

    def cost(worker: Worker) -> tuple[bool, int, int]:
        tokens = worker.pending_tokens + worker.missing_tokens(request)
        return worker.instance in request.avoid, tokens, len(worker.cache)

    return min(able, key=cost, default=None)


def prefill_workers(request: Request, prefills: Iterable[Worker], decodes: Iterable[Worker]) -> PrefillOf:
    """Those for the decode workers that are a pair with any."""
    prefills = list(prefills)
    instances = {worker.instance for worker in prefills}
    return {
        reads: prefill_worker(request, [worker for worker in prefills if worker.instance in reads])
        for reads in {worker.reads for worker in decodes}
        if reads & instances
    }


def decode_workers(request: Request, workers: Iterable[Worker], tokens: int) -> list[Worker]:
    """Those that may take it: they have room for so many tokens."""
    trusted = _trusted(worker for worker in workers if worker.can_hold(request.max_length))
    return [worker for worker in trusted if worker.has_room(request, tokens)]


def decode_worker(request: Request, able: list[Worker], prefill_of: PrefillOf) -> Worker:
    """The one with the most room, blocks found there and blocks to be computed there first counted several times, whose
    prefill worker is good for this prompt now, if there is one."""

    def is_doubtful(prefill: Worker | None) -> bool:
        return prefill is None or prefill.circuit.paused or prefill.instance in request.avoid

    doubtful = {reads for reads, prefill in prefill_of.items() if is_doubtful(prefill)}

    def cost(worker: Worker) -> tuple[bool, bool, int, int]:
        saved = worker.cache.hits(request.block_hashes) - worker.blocks(worker.pending_tokens)
        avoided = worker.instance in request.avoid
        return avoided, worker.reads in doubtful, -worker.room - HIT_WORTH * saved, len(worker.cache)

    return min(able, key=cost)


def _trusted(workers: Iterable[Worker]) -> list[Worker]:
    """Those that have not failed again and again of late; all of them where there is no other: then a try is better
    than a request that waits out the pause."""
    able = list(workers)
    return [worker for worker in able if not worker.circuit.paused] or able
