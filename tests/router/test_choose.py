from random import Random
from typing import Any

import pytest

from router.cluster.circuit import Circuit
from router.cluster.prefix_index import PrefixIndex
from router.cluster.worker import LOADED_WHILE_COMPUTED, Worker
from router.cluster.worker_faults import WorkerFault
from router.dispatch import choose
from router.dispatch.request import Prompt, Request
from router.mailbox import Mailbox
from router.turnstile import Turnstile
from tests.router.fake_worker import DECODE, PREFILL, FakeWorker
from twostroke.v1 import inference_pb2, worker_pb2

BLOCK = 16
HASHES = [number.to_bytes(16, "little") for number in range(8)]


def request(tokens: int = 8 * BLOCK + 5, max_length: int = 9 * BLOCK) -> Request:
    prompt = Prompt(tuple(range(tokens)), 0, frozenset(), "")
    made = Request("", 0, 0, prompt, worker_pb2.SamplingParams(), Mailbox(Turnstile()), max_length)
    made.block_hashes = HASHES[: tokens // BLOCK]
    return made


def worker(role: Any, cached: int = 0, pending: int = 0, free: int = 100, **hello: Any) -> Worker:
    made = Worker("", FakeWorker(role, **hello).hello, Circuit())
    made.pending_tokens = pending
    made.take_cache(worker_pb2.CacheChanges(published=b"".join(HASHES[:cached])))
    made.take_load(inference_pb2.WorkerLoad(ready=True, blocks=inference_pb2.Blocks(free=free)))
    return made


# ------------------------------------------------------------ prefill


def test_prefill_goes_where_the_prefix_is() -> None:
    workers = [worker(PREFILL, cached=2), worker(PREFILL, cached=6), worker(PREFILL)]
    assert choose.best_prefill(request(), workers) is workers[1]


def test_prefill_goes_elsewhere_where_waiting_costs_more_than_computing() -> None:
    holder, idle = worker(PREFILL, cached=6, pending=6 * BLOCK - 1), worker(PREFILL)
    assert choose.best_prefill(request(), [idle, holder]) is holder
    holder.pending_tokens += 2
    assert choose.best_prefill(request(), [holder, idle]) is idle


def test_prefill_goes_where_other_routers_have_less_waiting() -> None:
    shared, quiet = worker(PREFILL, pending=100), worker(PREFILL, pending=150)
    assert choose.best_prefill(request(), [quiet, shared]) is shared
    shared.take_load(inference_pb2.WorkerLoad(ready=True, pending_tokens=151))  # 51 of them are of others
    assert choose.best_prefill(request(), [shared, quiet]) is quiet
    shared.pending_tokens -= 2
    assert choose.best_prefill(request(), [quiet, shared]) is shared, "of its own there are fewer now"
    shared.take_load(inference_pb2.WorkerLoad(ready=True, pending_tokens=50))  # what was sent is still on its way
    assert choose.best_prefill(request(), [quiet, shared]) is shared
    shared.take_load(inference_pb2.WorkerLoad(ready=True, pending_tokens=10**9))
    assert choose.best_prefill(request(), [shared]) is shared, "others may not keep this router out"


def test_what_is_in_host_memory_draws_prompts_that_are_computed_there() -> None:
    """Those that are pulled get nothing from it."""
    host = worker_pb2.CacheChanges(published=b"".join(HASHES[:8]))
    prefills, pulls = (worker(DECODE, free=70, host_blocks=8, prefill_tokens=tokens) for tokens in (2 * BLOCK, 0))
    for holder, wins in ((prefills, True), (pulls, False)):
        holder.take_host_cache(host)
        roomy = worker(DECODE, free=100)
        assert (choose.best_decode(request(), [roomy, holder], {}) is holder) == wins
    holder = worker(PREFILL, host_blocks=8)
    holder.take_host_cache(host)
    assert choose.best_prefill(request(), [worker(PREFILL), holder]) is holder
    assert choose.best_prefill(request(), [holder, faster := worker(PREFILL, cached=8)]) is faster


def test_what_is_loaded_counts_for_a_part_of_its_computing() -> None:
    made = worker(PREFILL, cached=2, host_blocks=8)
    assert made.missing_tokens(request()) == 6 * BLOCK + 5
    made.take_host_cache(worker_pb2.CacheChanges(published=b"".join(HASHES[1:6])))
    assert made.missing_tokens(request()) == 2 * BLOCK + 5 + 4 * BLOCK // LOADED_WHILE_COMPUTED


def test_a_sequence_takes_room_for_what_is_only_in_host_memory() -> None:
    made = worker(DECODE, free=9, host_blocks=8, prefill_tokens=BLOCK)
    made.take_host_cache(worker_pb2.CacheChanges(published=b"".join(HASHES[:8])))
    made.cache.begin(HASHES[:8], computed_here=True)
    made.reserve(9)
    assert not made.has_room(request(), 9 * BLOCK)
    assert made.new_blocks(request(), 9 * BLOCK) == 9


def test_more_in_host_memory_than_fits_there_is_a_fault() -> None:
    made = worker(PREFILL, host_blocks=2)
    made.take_host_cache(worker_pb2.CacheChanges(published=b"".join(HASHES[:2])))
    with pytest.raises(WorkerFault, match="it can find 3 of 2 blocks"):
        made.take_host_cache(worker_pb2.CacheChanges(published=HASHES[2]))


def test_a_hole_in_the_cache_ends_what_is_found() -> None:
    holey, whole = worker(PREFILL, cached=8), worker(PREFILL, cached=2)
    holey.cache.apply(worker_pb2.CacheChanges(dropped=HASHES[1]))
    assert choose.best_prefill(request(), [holey, whole]) is whole


def test_new_prefixes_go_where_the_cache_holds_less() -> None:
    full, empty = worker(PREFILL, cached=8), worker(PREFILL)
    unknown = request()
    unknown.block_hashes = [b"\xff" * 16]
    assert choose.best_prefill(unknown, [full, empty]) is empty


def test_prefill_avoids_who_failed_and_who_has_enough_to_do() -> None:
    holder, other = worker(PREFILL, cached=8), worker(PREFILL, pending=1000)
    failed = request()
    failed.avoid.add(holder.instance)
    assert choose.best_prefill(failed, [holder, other]) is other
    assert choose.best_prefill(failed, [holder]) is holder
    assert choose.best_prefill(request(), [worker(PREFILL, cached=8, pending=100, max_batch=50)]) is None


# ------------------------------------------------------------ decode


def decode_worker(request: Request, workers: list[Worker], prefills: tuple[Worker, ...] = ()) -> Worker | None:
    able = choose.with_room(request, workers, 9 * BLOCK)
    return choose.best_decode(request, able, choose.best_prefills(request, prefills, able)) if able else None


def test_decode_goes_where_the_prefix_is_unless_the_other_has_much_more_room() -> None:
    holder, other = worker(DECODE, cached=5, free=30), worker(DECODE, free=30 + 5 * choose.HIT_WORTH - 1)
    assert decode_worker(request(), [other, holder]) is holder
    roomy = worker(DECODE, free=30 + 5 * choose.HIT_WORTH + 1)
    assert decode_worker(request(), [holder, roomy]) is roomy


def test_decode_without_prefix_goes_where_room_is() -> None:
    workers = [worker(DECODE, free=20), worker(DECODE, free=21)]
    assert decode_worker(request(), workers) is workers[1]


def test_blocks_in_use_take_no_room_again() -> None:
    """Cached blocks that nobody holds do: they are counted as room until they are taken."""
    tight = worker(DECODE, cached=8, free=4)
    assert decode_worker(request(), [tight]) is None
    tight.cache.begin(HASHES[:5], computed_here=False)
    assert decode_worker(request(), [tight]) is tight
    tight.cache.end(HASHES[:5], computed_here=False)
    assert decode_worker(request(), [tight]) is None


def test_who_waits_for_room_has_not_all_of_its_blocks_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked about with every message of every worker, and may share thousands of blocks with those that run."""
    full, tight = worker(DECODE, cached=8, free=0), worker(DECODE, cached=8, free=2)
    full.cache.begin(HASHES, computed_here=False)
    tight.cache.begin(HASHES[:6], computed_here=False)
    monkeypatch.delattr(PrefixIndex, "shared")
    assert decode_worker(request(), [full, tight]) is None


def test_whether_there_is_room_is_said_as_by_counting_all_that_is_shared() -> None:
    random = Random(7)
    for _ in range(2_000):
        made = worker(DECODE, free=random.randrange(10))
        made.cache.apply(worker_pb2.CacheChanges(published=b"".join(random.sample(HASHES, random.randrange(9)))))
        made.cache.begin(HASHES[: random.randrange(9)], computed_here=random.random() < 0.5)
        asked = request(tokens=random.randrange(1, 8 * BLOCK + 16))
        tokens = asked.length + random.randrange(1, 40)
        assert made.has_room(asked, tokens) == (made.new_blocks(asked, tokens) <= made.room)


def paired(decode: Worker, *prefills: Worker) -> Worker:
    decode.reads = frozenset(prefill.instance for prefill in prefills)
    return decode


def test_a_prompt_is_computed_by_who_is_a_pair_with_the_decode_worker() -> None:
    idle, loaded = worker(PREFILL), worker(PREFILL, pending=100, max_batch=50)
    with_both, with_one, with_none = (
        paired(worker(DECODE), idle, loaded),
        paired(worker(DECODE), loaded),
        worker(DECODE),
    )
    found = choose.best_prefills(request(), [idle, loaded], [with_both, with_one, with_none])
    assert found == {with_both.reads: idle, with_one.reads: None}


def test_decode_goes_to_a_pair_that_can_compute_the_prompt_now() -> None:
    idle, loaded = worker(PREFILL), worker(PREFILL, pending=100, max_batch=50)
    near, far = paired(worker(DECODE, free=90), idle), paired(worker(DECODE, free=100), loaded)
    alone = worker(DECODE, free=110)
    assert decode_worker(request(), [near, far], (idle, loaded)) is near
    assert decode_worker(request(), [far], (idle, loaded)) is far
    assert decode_worker(request(), [near, alone], (idle,)) is alone, "who prefills itself needs no other"
    failed = request()
    failed.avoid.add(idle.instance)
    loaded.pending_tokens = 0
    assert decode_worker(failed, [near, far], (idle, loaded)) is far
    assert decode_worker(failed, [near], (idle,)) is near


def test_decode_does_not_go_where_the_sequence_could_never_end() -> None:
    small = worker(DECODE, cached=8, max_length=9 * BLOCK - 1)
    assert decode_worker(request(), [small]) is None


def test_decode_goes_where_fewer_prompts_are_to_be_computed_first_unless_the_other_is_much_fuller() -> None:
    """Of workers that prefill themselves; one that does not has nothing to compute."""
    waiting, other = worker(DECODE, pending=3 * BLOCK, free=90), worker(DECODE, free=90 - 3 * choose.HIT_WORTH + 1)
    assert decode_worker(request(), [waiting, other]) is other
    fuller = worker(DECODE, free=90 - 3 * choose.HIT_WORTH - 1)
    assert decode_worker(request(), [fuller, waiting]) is waiting


def test_whether_it_prefills_is_said_as_by_counting_all_that_it_lacks() -> None:
    random = Random(5)
    for _ in range(2_000):
        made = worker(DECODE, prefill_tokens=random.randrange(9 * BLOCK))
        made.cache.apply(worker_pb2.CacheChanges(published=b"".join(random.sample(HASHES, random.randrange(9)))))
        made.cache.begin(HASHES[: random.randrange(9)], computed_here=random.random() < 0.5)
        asked = request(tokens=random.randrange(1, 8 * BLOCK + 16))
        assert made.prefills(asked) == (made.missing_tokens(asked) <= made.hello.prefill_tokens)
