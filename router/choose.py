"""Which pair of workers a request goes to: where least is left to do for it, counting what the caches there hold.

Between workers that are equal in this, the one whose cache holds less: it has less to lose.
"""

from collections.abc import Iterable, Mapping

from router.request import Request
from router.worker import Worker

# A block that decode need not pull is worth so many blocks of room. Pulls are quick, so the emptier worker would nearly
# always win if it were one, and every prefix would end up in every pool, where it drives out others. A block that is
# still to be computed there, for prompts that came before, weighs as much: a prompt that waits delays what comes after
# it by about as much as four running sequences of its length do.
HIT_WORTH = 4


def prefill_worker(request: Request, workers: Iterable[Worker]) -> Worker | None:
    """The one with the fewest tokens to compute until this prompt is done; None while all have enough to do."""
    trusted = _trusted(worker for worker in workers if worker.can_hold(request.length + 1))
    able = [worker for worker in trusted if worker.accepts_prefill]

    def cost(worker: Worker) -> tuple[bool, int, int]:
        tokens = worker.pending_tokens + worker.missing_tokens(request)
        return worker.instance in request.avoid, tokens, len(worker.cache)

    return min(able, key=cost, default=None)


def prefill_workers(request: Request, workers: Iterable[Worker]) -> dict[str, Worker | None]:
    """That of each host that has any."""
    hosts: dict[str, list[Worker]] = {}
    for worker in workers:
        hosts.setdefault(worker.host, []).append(worker)
    return {host: prefill_worker(request, those) for host, those in hosts.items()}


def decode_workers(request: Request, workers: Iterable[Worker], tokens: int) -> list[Worker]:
    """Those that may take it: they have room for so many tokens."""
    trusted = _trusted(worker for worker in workers if worker.can_hold(request.prompt.max_length))
    return [worker for worker in trusted if worker.has_room(request, tokens)]


def decode_worker(request: Request, able: list[Worker], prefill_on: Mapping[str, Worker | None]) -> Worker:
    """The one with the most room, blocks found there and blocks to be computed there first counted several times, on a
    host whose prefill worker is good for this prompt now, if there is one."""

    def is_doubtful(host: str) -> bool:
        prefill = prefill_on[host]
        return prefill is None or prefill.circuit.paused or prefill.instance in request.avoid

    doubtful = {host for host in prefill_on if is_doubtful(host)}

    def cost(worker: Worker) -> tuple[bool, bool, int, int]:
        saved = worker.cache.hits(request.block_hashes) - worker.blocks(worker.pending_tokens)
        avoided = worker.instance in request.avoid
        return avoided, worker.host in doubtful, -worker.room - HIT_WORTH * saved, len(worker.cache)

    return min(able, key=cost)


def _trusted(workers: Iterable[Worker]) -> list[Worker]:
    """Those that have not failed again and again of late; all of them where there is no other: then a try is better
    than a request that waits out the pause."""
    able = list(workers)
    return [worker for worker in able if not worker.circuit.paused] or able
