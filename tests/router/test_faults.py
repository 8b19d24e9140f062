"""Every way in which a request can go wrong, in every state: the client gets its answer or a status code that says what
happened, and nobody holds anything afterwards (`cluster` checks that at its end)."""

import asyncio
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import BytesValue
from structlog.testing import capture_logs

from common.kv.prefix_hash import cache_root
from router.answers import answer
from router.cluster.outbox import Outbox
from router.cluster.worker import REFUSAL_PAUSE, Worker
from router.dispatch import choose, dispatcher, placement
from tests.router import fake_worker
from tests.router.cluster import PROMPT, Cluster, cluster, eventually, expected, request
from tests.router.fake_worker import DECODE, PREFILL, Ended, FakeWorker, Script
from twostroke.v1 import inference_pb2, worker_pb2

Cause = Ended.Cause.ValueType

# States that a request can be made to stay in, by what a worker does not do.
STATES = {
    "prefill": ([Script(silent=True)], [Script()]),
    "reserve": ([Script()], [Script(silent=True)]),
    "start": ([Script()], [Script(silent_at_start=True)]),
    "decode": ([Script()], [Script(stop_after=3)]),
    "queue": ([Script()], [Script(refuse=10**9)]),
}


def stuck(it: Cluster, state: str, requests: int = 1) -> bool:
    prefill, decode = it.prefills[0], it.decodes[0]
    match state:
        case "prefill":
            return len(prefill.held) == requests and it.router.dispatcher.running == requests
        case "reserve":
            return len(decode.held) == requests and len(prefill.held) == requests
        case "start":
            return len(decode.starts) == requests
        case "decode":
            return sum(running.steps == 3 for running in decode.running.values()) == requests
        case _:
            return len(decode.reserves) >= requests


async def failing(it: Cluster, **fields: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await it.generate(**fields)
    return failed.value


# ---------------------------------------------------------------- the client goes


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("streaming", [False, True])
async def test_a_cancel_frees_both_workers_at_once(
    model: Path, state: str, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when a worker says something the next time."""
    monkeypatch.setattr(fake_worker, "HEARTBEAT_SECONDS", 60)
    prefills, decodes = STATES[state]
    async with cluster(model, prefills, decodes) as it:
        if streaming:
            call = it.stub.GenerateStream(request(max_tokens=100))
            reading = asyncio.ensure_future(_read_all(call))
        else:
            call = reading = it.stub.Generate(request(max_tokens=100))
        await eventually(lambda: stuck(it, state))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await eventually(it.nothing_held)


async def _read_all(call: Any) -> None:
    async for _ in call:
        pass


async def test_more_answers_than_the_queue_ever_takes_are_refused_for_good(model: Path) -> None:
    async with cluster(model, max_queue=3) as it:
        error = await failing(it, n=4)
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == "n: 4 answers are more than the router's queue of 3"
        assert len((await it.generate(n=3)).choices) == 3


@pytest.mark.parametrize("state", STATES)
async def test_a_deadline_frees_both_workers(model: Path, state: str) -> None:
    prefills, decodes = STATES[state]
    async with cluster(model, prefills, decodes) as it:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await it.stub.Generate(request(max_tokens=100), timeout=0.5)
        assert failed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually(it.nothing_held)
        labels = {"method": "Generate", "code": "DEADLINE_EXCEEDED"}
        await eventually(lambda: it.router.metrics.registry.get_sample_value("twostroke_calls_total", labels) == 1)


CLIENT = """
import sys, grpc
call = grpc.insecure_channel(sys.argv[1]).unary_stream("/twostroke.v1.Inference/GenerateStream")
for _ in call(bytes.fromhex(sys.argv[2])):
    pass
"""


async def test_a_client_that_dies_frees_both_workers(model: Path) -> None:
    async with cluster(model, *STATES["decode"]) as it:
        message = request(max_tokens=100).SerializeToString()
        client = await asyncio.create_subprocess_exec(sys.executable, "-c", CLIENT, it.address, message.hex())
        await eventually(lambda: stuck(it, "decode"))
        client.kill()
        await client.wait()
        await eventually(it.nothing_held)


async def test_one_choice_of_several_that_fails_ends_the_others(model: Path) -> None:
    async with cluster(model, decodes=[Script(reject=1, stop_after=3)]) as it:
        assert (await failing(it, n=3, max_tokens=100)).code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_cancel_lets_those_behind_go_that_need_less(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not when a worker says something the next time."""
    monkeypatch.setattr(placement, "REFUSAL_PAUSE", 60)
    monkeypatch.setattr(fake_worker, "HEARTBEAT_SECONDS", 60)
    small = FakeWorker(DECODE, Script(stop_after=3), num_blocks=8, max_length=128)
    async with cluster(model, decodes=[small]) as it:
        running = it.stub.Generate(request(max_tokens=20))
        await eventually(lambda: len(small.running) == 1)
        long = it.stub.Generate(request(prompt=range(40, 120)))
        await eventually(lambda: it.router.dispatcher.queued == 1)
        short = it.stub.Generate(request())
        await eventually(lambda: it.router.dispatcher.queued == 2)
        long.cancel()
        await eventually(lambda: len(small.running) == 2)
        for call in (running, short):
            call.cancel()
        await eventually(it.nothing_held)


# ---------------------------------------------------------------- a worker says no


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("at_once", [2, 100])
async def test_what_comes_before_a_failure_is_given_and_may_end_the_answer(
    model: Path, at_once: int, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens and the failure are in one message, as they may be for a router that is slow to read."""
    monkeypatch.setattr(answer, "MOST_TOKENS", at_once)
    async with cluster(model, decodes=[Script(stop_after=3)]) as it:
        decode = it.decodes[0]
        last = inference_pb2.DetokenizeRequest(token_ids=expected(8)[-1:])
        stop = (await it.stub.Detokenize(last)).text if ends else "never"
        call = it.stub.GenerateStream(request(max_tokens=100, stopping={"stop": [stop]}))
        chunks: list[inference_pb2.GenerateChunk] = []

        async def read() -> None:
            async for chunk in call:
                chunks.append(chunk)

        reading = asyncio.ensure_future(read())
        await eventually(lambda: any(running.steps == 3 for running in decode.running.values()))
        (attempt,) = decode.running
        more = expected(8)[4:]
        decode.send(
            tokens=worker_pb2.StepTokens(attempt_ids=[attempt] * len(more), token_ids=more),
            ended=[Ended(attempt_id=attempt, cause=Ended.CAUSE_REJECTED, detail="scripted")],
        )
        del decode.held[attempt], decode.running[attempt]
        if ends:
            await reading
        else:
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await reading
            assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        given = [token for chunk in chunks for token in chunk.delta.token_ids]
        assert chunks[-1].HasField("finish") == ends
        assert given == expected(8)
        assert it.router.metrics.registry.get_sample_value("twostroke_output_tokens_total") == 8


async def test_a_cancel_sends_none_of_the_choices_that_wait(model: Path) -> None:
    """To the room that the others have left."""
    small = FakeWorker(DECODE, Script(stop_after=3), num_blocks=8, max_length=64)
    async with cluster(model, decodes=[small]) as it:
        call = it.stub.Generate(request(n=8))
        await eventually(lambda: len(small.running) == 4 and it.router.dispatcher.queued == 4)
        call.cancel()
        await eventually(it.nothing_held)
        assert len(small.reserves) == len(it.prefills[0].prefills) == 4


async def test_a_refused_reservation_waits_for_room(model: Path) -> None:
    async with cluster(model, decodes=[Script(refuse=2)]) as it:
        choice = (await it.generate()).choices[0]
        assert list(choice.token_ids) == expected(8)
        assert choice.finish.usage.resumes == 0
        assert len(it.decodes[0].reserves) == 3
        assert len({reserve.attempt_id for reserve in it.decodes[0].reserves}) == 3


async def test_a_refused_request_goes_to_the_other_decode_worker(model: Path) -> None:
    async with cluster(model, decodes=[Script(refuse=10**9), Script()]) as it:
        for _ in range(4):
            assert list((await it.generate()).choices[0].token_ids) == expected(8)
        assert len(it.decodes[1].starts) == 4


async def test_a_prompt_waits_for_a_prefill_worker_that_is_full(model: Path) -> None:
    async with cluster(model, prefills=[Script(full=2)]) as it:
        began = time.monotonic()
        choice = (await it.generate()).choices[0]
        assert time.monotonic() - began > 2 * REFUSAL_PAUSE
        assert list(choice.token_ids) == expected(8)
        assert choice.finish.usage.resumes == 0
        assert len({prefill.attempt_id for prefill in it.prefills[0].prefills}) == 3
        await eventually(it.nothing_held)


async def test_a_prompt_goes_to_the_other_prefill_worker_when_one_is_full(model: Path) -> None:
    async with cluster(model, prefills=[Script(full=10**9), Script()]) as it:
        for _ in range(4):
            assert list((await it.generate()).choices[0].token_ids) == expected(8)
        assert len(it.prefills[1].prefills) == 4


async def test_no_room_is_not_asked_for(model: Path) -> None:
    """With room for one at a time, the second request waits in the router, and nobody has to refuse it."""
    small = FakeWorker(DECODE, Script(step_seconds=0.002), num_blocks=3, max_length=48)
    async with cluster(model, decodes=[small]) as it:
        answers = await asyncio.gather(*(it.generate(max_tokens=28) for _ in range(3)))
        assert all(list(answer.choices[0].token_ids) == expected(28) for answer in answers)
        assert len(small.reserves) == 3


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_what_a_worker_rejects_ends_with_its_reason(model: Path, side: str) -> None:
    scripts = {"prefill": [Script()], "decode": [Script()]} | {side: [Script(reject=1)]}
    async with cluster(model, scripts["prefill"], scripts["decode"]) as it:
        error = await failing(it)
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == f"the {side} worker cannot serve this request: scripted"


# ---------------------------------------------------------------- resumes


@pytest.mark.parametrize(
    ("prefill", "decode", "resumes", "headroom"),
    [
        (Script(fail=1), Script(), 1, 4),
        (Script(), Script(fail=1), 1, 4),
        (Script(fail=1), Script(fail=1), 1, 4),
        (Script(), Script(lose_lease=1), 1, 4),
        (Script(), Script(end_after={0: [Ended.CAUSE_PREEMPTED]}), 1, 8),
        (Script(), Script(end_after={3: [Ended.CAUSE_PREEMPTED] * 2}), 2, 16),
        (Script(), Script(end_after={3: [Ended.CAUSE_PREEMPTED] * 5}), 5, 20),  # all that is left
        (Script(), Script(end_after={3: [Ended.CAUSE_FAILED] * 3}), 3, 4),
        (Script(), Script(end_after={2: [Ended.CAUSE_FAILED], 3: [Ended.CAUSE_PREEMPTED]}), 2, 8),
        (Script(), Script(end_after={3: [Ended.CAUSE_FINISHED]}), 1, 4),  # which it is not
    ],
)
async def test_a_resumed_request_goes_on_where_it_was(
    model: Path, prefill: Script, decode: Script, resumes: int, headroom: int
) -> None:
    async with cluster(model, [prefill], [decode], headroom_tokens=4) as it:
        response = await it.generate(max_tokens=40, n=1)
        choice = response.choices[0]
        assert list(choice.token_ids) == expected(40)
        assert choice.finish.usage.resumes == resumes
        last = it.decodes[0].reserves[-1]
        assert tuple(last.sequence.token_ids[: len(PROMPT)]) == PROMPT
        assert list(last.sequence.token_ids[len(PROMPT) :]) == expected(len(last.sequence.token_ids) - len(PROMPT))
        assert last.sequence.prompt_length == len(PROMPT)
        assert last.headroom_tokens == headroom
        assert len(last.sequence.block_hashes) == 16 * (len(last.sequence.token_ids) // 16)


async def test_a_resume_does_not_go_to_the_worker_that_failed(model: Path) -> None:
    async with cluster(model, decodes=[Script(fail=10**9), Script()]) as it:
        for _ in range(4):
            choice = (await it.generate()).choices[0]
            assert list(choice.token_ids) == expected(8)
            assert choice.finish.usage.resumes <= 1


async def test_cached_tokens_of_a_request_that_was_resumed_before_it_decoded_are_those_of_its_prompt(
    model: Path,
) -> None:
    """The first token was there already, and the last cached block has it in it."""
    async with cluster(model, decodes=[Script(lose_lease=1)]) as it:
        usage = (await it.generate(prompt=PROMPT[:4])).choices[0].finish.usage
        assert (usage.prompt_tokens, usage.decode_cached_tokens, usage.resumes) == (4, 4, 1)


async def test_faults_without_end_are_answered_with_unavailable(model: Path) -> None:
    async with cluster(model, decodes=[Script(lose_lease=10**9)], max_resumes=2) as it:
        error = await failing(it)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert (error.details() or "").startswith("gave up after 3 faults; the last: lease_lost")
        assert len(it.decodes[0].starts) == 3


async def test_a_worker_that_preempts_what_has_no_token_yet_is_at_fault(model: Path) -> None:
    async with cluster(model, prefills=[Script(preempt=10**9)], max_resumes=2) as it:
        error = await failing(it)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert (error.details() or "").startswith("gave up after 3 faults; the last: preempted")
        assert len(it.prefills[0].prefills) == 3


async def test_a_draining_worker_gets_nothing_more(model: Path) -> None:
    drains = Script(end_after={2: [Ended.CAUSE_DRAINING]}, step_seconds=0.001)
    async with cluster(model, decodes=[drains], worker_grace=5) as it:
        answer = asyncio.ensure_future(it.generate(max_tokens=30))
        await eventually(lambda: not it.router.dispatcher.workers.ready)
        spare = FakeWorker(DECODE)
        it.decodes.append(spare)
        it.router.registry._keep_link((await spare.start(), DECODE))
        assert list((await answer).choices[0].token_ids) == expected(30)
        assert len(it.decodes[0].reserves) == 1


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_what_a_draining_worker_turns_away_is_no_resume(model: Path, side: str) -> None:
    scripts = {"prefill": [Script()], "decode": [Script()]} | {side: [Script(drain=10**9), Script()]}
    async with cluster(model, scripts["prefill"], scripts["decode"]) as it:
        for answer in await asyncio.gather(*(it.generate() for _ in range(4))):
            assert list(answer.choices[0].token_ids) == expected(8)
            if side == "prefill":  # else its first token may be there before the refusal
                assert answer.choices[0].finish.usage.resumes == 0


async def test_a_lost_worker_costs_no_more_room_than_it_had(model: Path) -> None:
    """Two workers with room for 32 requests of 20 tokens and head-room each, or for nine at their full length."""
    small = [FakeWorker(DECODE, Script(stop_after=3), num_blocks=32 * 18) for _ in range(2)]  # they grow no further
    async with cluster(model, decodes=small) as it:
        calls = [it.stub.Generate(request(max_tokens=None)) for _ in range(40)]
        await eventually(lambda: sum(len(worker.running) for worker in small) == 40)
        await small[0].die()
        await eventually(lambda: len(small[1].running) == 32)
        for call in calls:
            call.cancel()


async def test_resumed_requests_are_first_in_the_queue(model: Path) -> None:
    """A decode worker with room for one: the preempted request runs again before those that came after it."""
    small = FakeWorker(DECODE, Script(stop_after=2), num_blocks=3, max_length=48)
    async with cluster(model, decodes=[small]) as it:
        answers = []
        for token in (40, 41, 42):
            answers.append(asyncio.ensure_future(it.generate(prompt=(token,) * 20, max_tokens=28)))
            await eventually(lambda: bool(small.running) and it.router.dispatcher.queued == len(answers) - 1)
        small.script = Script(end_after={2: [Ended.CAUSE_PREEMPTED]})
        await asyncio.gather(*answers)
        order = [reserve.sequence.token_ids[0] for reserve in small.reserves]
        assert order == [40, 40, 41, 42]


# ---------------------------------------------------------------- workers die


@pytest.mark.parametrize("state", [state for state in STATES if state != "queue"])
@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_workers_death_is_survived_on_another(model: Path, state: str, side: str) -> None:
    prefills, decodes = STATES[state]
    async with cluster(model, prefills, decodes, worker_grace=5) as it:
        answer = asyncio.ensure_future(it.generate(max_tokens=20))
        await eventually(lambda: stuck(it, state))
        good: dict[str, FakeWorker] = {"prefill": FakeWorker(PREFILL), "decode": FakeWorker(DECODE)}
        for name, workers in (("prefill", it.prefills), ("decode", it.decodes)):
            worker = good[name]
            workers.append(worker)
            it.router.registry._keep_link((await worker.start(), worker.role))
        await eventually(it.introduced)
        victim = (it.prefills if side == "prefill" else it.decodes)[0]
        await victim.die()
        if side != ("prefill" if state == "prefill" else "decode"):  # the other side is the one that hangs
            await (it.decodes if side == "prefill" else it.prefills)[0].die()
        assert list((await answer).choices[0].token_ids) == expected(20)


@pytest.mark.parametrize(
    ("side", "state"),
    [("prefill", state) for state in STATES if state != "decode"] + [("decode", state) for state in STATES],
)
async def test_with_no_worker_left_the_answer_is_unavailable_soon(model: Path, state: str, side: str) -> None:
    prefills, decodes = STATES[state]
    async with cluster(model, prefills, decodes) as it:
        answer = asyncio.ensure_future(failing(it, max_tokens=20))
        await eventually(lambda: stuck(it, state))
        began = time.monotonic()
        await (it.prefills if side == "prefill" else it.decodes)[0].die()
        error = await answer
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert error.details() == f"no {side} worker is connected; it is safe to try again"
        assert 0.2 < time.monotonic() - began < 5


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_worker_that_hangs_is_taken_for_lost(model: Path, side: str) -> None:
    """Its gRPC side answers as ever, hello included: only what comes from its engine counts."""
    hanging = Script(silent=True) if side == "prefill" else Script(stop_after=3)
    scripts = {"prefill": [Script()], "decode": [Script()]} | {side: [hanging]}
    async with cluster(model, scripts["prefill"], scripts["decode"], worker_silence_seconds=1.5, worker_grace=5) as it:
        answer = asyncio.ensure_future(it.generate(max_tokens=20))
        await eventually(lambda: stuck(it, side))
        workers = it.prefills if side == "prefill" else it.decodes
        hung = workers[0]
        spare = FakeWorker(hung.role)
        workers.append(spare)
        it.router.registry._keep_link((await spare.start(), hung.role))
        await eventually(it.introduced)
        hung.hung = True
        choice = (await answer).choices[0]
        assert list(choice.token_ids) == expected(20)
        assert choice.finish.usage.resumes == 1
        assert not hung.held
        await asyncio.sleep(0.3)  # by now the router has connected to it again
        assert len(it.router.dispatcher.workers.all()) == 2
        hung.hung, hung.script = False, Script()
        await eventually(lambda: len(it.router.dispatcher.workers.all()) == 3)


async def test_a_quiet_worker_is_not_lost(model: Path) -> None:
    async with cluster(model, prefills=[Script(prefill_seconds=2.0)], worker_silence_seconds=1.0) as it:
        choice = (await it.generate()).choices[0]
        assert list(choice.token_ids) == expected(8)
        assert choice.finish.usage.resumes == 0


async def test_a_worker_that_is_not_ready_is_chosen_no_more(model: Path) -> None:
    async with cluster(model, decodes=[Script(step_seconds=0.01), Script(step_seconds=0.01)]) as it:
        running = asyncio.ensure_future(it.generate(max_tokens=60))
        await eventually(lambda: any(worker.running for worker in it.decodes))
        draining, other = sorted(it.decodes, key=lambda worker: not worker.running)
        draining.ready = False
        await eventually(lambda: len(it.router.dispatcher.workers.all()) == 2)
        for _ in range(4):
            await it.generate()
        assert (len(draining.reserves), len(other.reserves)) == (1, 4)
        assert (await running).choices[0].finish.usage.resumes == 0
        load = await it.stub.GetLoad(inference_pb2.GetLoadRequest())
        assert {worker.instance for worker in load.workers if not worker.ready} == {draining.instance}


async def test_a_worker_that_is_draining_when_it_comes_is_not_chosen(model: Path) -> None:
    late = FakeWorker(DECODE)
    late.ready = False
    async with cluster(model, decodes=[Script(), late], ready=False) as it:
        await eventually(lambda: len(it.router.registry.connected) == 3)
        for _ in range(4):
            await it.generate()
        assert not late.reserves


async def test_decoding_goes_on_without_the_prefill_worker(model: Path) -> None:
    async with cluster(model, decodes=[Script(step_seconds=0.002)]) as it:
        answer = asyncio.ensure_future(it.generate(max_tokens=100))
        await eventually(lambda: any(running.steps > 3 for running in it.decodes[0].running.values()))
        await it.prefills[0].die()
        choice = (await answer).choices[0]
        assert list(choice.token_ids) == expected(100)
        assert choice.finish.usage.resumes == 0


async def test_after_a_restart_the_next_request_succeeds(model: Path) -> None:
    async with cluster(model) as it:
        await it.generate()
        old = it.decodes[0]
        await old.die()
        await eventually(lambda: not it.router.dispatcher.workers.ready)
        it.decodes[0] = FakeWorker(DECODE)
        await it.decodes[0].start(old.address)
        await eventually(lambda: it.router.dispatcher.workers.ready)
        assert list((await it.generate()).choices[0].token_ids) == expected(8)
        assert it.decodes[0].reserves


async def test_without_workers_a_new_request_fails_at_once(model: Path) -> None:
    async with cluster(model, prefills=[], ready=False, worker_grace=2) as it:
        await eventually(lambda: it.router.dispatcher.workers.gone() == PREFILL)
        began = time.monotonic()
        error = await failing(it)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert "prefill" in (error.details() or "")
        assert time.monotonic() - began < 2


async def test_a_worker_that_comes_in_time_is_waited_for(model: Path) -> None:
    async with cluster(model, prefills=[], ready=False, worker_grace=5) as it:
        answer = asyncio.ensure_future(it.generate())
        await eventually(lambda: it.router.dispatcher.queued == 1)
        late = FakeWorker(PREFILL)
        it.prefills.append(late)
        it.router.registry._keep_link((await late.start(), PREFILL))
        assert list((await answer).choices[0].token_ids) == expected(8)


# ---------------------------------------------------------------- too much


async def test_a_full_queue_is_an_answer(model: Path) -> None:
    async with cluster(model, decodes=[Script(refuse=10**9)], max_queue=3) as it:
        waiting = [it.stub.Generate(request()) for _ in range(3)]
        await eventually(lambda: it.router.dispatcher.queued == 3)
        error = await failing(it)
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "3 of 3" in (error.details() or "")
        it.decodes[0].script.refuse = 0
        for answer in await asyncio.gather(*waiting):
            assert list(answer.choices[0].token_ids) == expected(8)
        assert (await it.generate()).choices


async def test_prompts_beyond_two_batches_wait_in_the_router(model: Path) -> None:
    slow = FakeWorker(PREFILL, Script(prefill_seconds=0.05), max_batch=len(PROMPT))
    async with cluster(model, prefills=[slow]) as it:
        prompts = [tuple(range(start, start + len(PROMPT))) for start in range(6)]
        answers = [asyncio.ensure_future(it.generate(prompt=prompt)) for prompt in prompts]
        await eventually(lambda: len(slow.held) > 0)
        assert it.router.dispatcher.running <= 2
        await asyncio.gather(*answers)


async def test_a_client_that_does_not_read_holds_up_nobody(model: Path) -> None:
    """What it does not take is kept as token ids, and its answer is packed into few messages when it reads on."""
    async with cluster(model) as it:
        slow = it.stub.GenerateStream(request(max_tokens=1500))
        await anext(aiter(slow))
        assert list((await it.generate(max_tokens=200)).choices[0].token_ids) == expected(200)
        chunks = [chunk async for chunk in slow]
        assert [token for chunk in chunks for token in chunk.delta.token_ids] == expected(1500)


async def test_many_at_once_with_everything_going_wrong(model: Path) -> None:
    def bad() -> Script:
        ends = {2: [Ended.CAUSE_PREEMPTED] * 20, 5: [Ended.CAUSE_FAILED] * 10, 7: [Ended.CAUSE_LEASE_LOST] * 5}
        return Script(refuse=10, end_after=ends)

    async with cluster(model, [Script(fail=3), Script()], [bad(), bad()], max_resumes=50) as it:
        prompts: list[Sequence[int]] = [tuple(range(40, 41 + length % 60)) for length in range(100)]
        answers = await asyncio.gather(*(it.generate(prompt=prompt, max_tokens=30) for prompt in prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            assert list(answer.choices[0].token_ids) == expected(30, prompt)


@pytest.mark.parametrize("at", ["best_decode", "sequence_of", "Reserve"])
async def test_a_fault_of_the_router_costs_one_request_and_no_block(
    model: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: object, **__: object) -> None:
        raise ValueError("a fault")

    async with cluster(model, decodes=[Script(step_seconds=0.05)]) as it:
        where = {"best_decode": choose, "sequence_of": placement, "Reserve": worker_pb2}[at]
        with monkeypatch.context() as patch:
            patch.setattr(where, at, fault)
            error = await failing(it, n=2, max_tokens=500)
        assert error.code() == grpc.StatusCode.INTERNAL
        await eventually(it.nothing_held)
        assert list((await it.generate()).choices[0].token_ids) == expected(8)


async def test_a_fault_of_the_router_while_a_worker_is_lost_costs_one_request(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(model, decodes=[Script(stop_after=3)], worker_grace=10) as it:
        answers = [asyncio.ensure_future(it.generate(max_tokens=20)) for _ in range(3)]
        await eventually(lambda: stuck(it, "decode", requests=3))
        resume, calls = dispatcher.Dispatcher._resume, itertools.count()

        def faulty(*arguments: Any, **detail: Any) -> None:
            assert next(calls), "the first is not resumed"
            resume(*arguments, **detail)

        monkeypatch.setattr(dispatcher.Dispatcher, "_resume", faulty)
        await it.decodes[0].die()
        reborn = FakeWorker(DECODE)
        await reborn.start(it.decodes[0].address)
        it.decodes[:] = [reborn]
        ends = await asyncio.gather(*answers, return_exceptions=True)
        failed = [end for end in ends if isinstance(end, grpc.aio.AioRpcError)]
        assert [error.code() for error in failed] == [grpc.StatusCode.INTERNAL]
        assert len(reborn.starts) == 2


async def test_a_fault_of_the_router_over_what_a_worker_says_costs_one_request(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(model, decodes=[Script(end_after={3: [Ended.CAUSE_PREEMPTED] * 2})]) as it:
        resume, calls = dispatcher.Dispatcher._resume, itertools.count()

        def faulty(*arguments: Any, **detail: Any) -> None:
            assert next(calls), "the first is not resumed"
            resume(*arguments, **detail)

        monkeypatch.setattr(dispatcher.Dispatcher, "_resume", faulty)
        ends = await asyncio.gather(*(it.generate(max_tokens=20) for _ in range(3)), return_exceptions=True)
        failed = [end for end in ends if isinstance(end, grpc.aio.AioRpcError)]
        assert [error.code() for error in failed] == [grpc.StatusCode.INTERNAL]
        answers = [end for end in ends if isinstance(end, inference_pb2.GenerateResponse)]
        resumes = [answer.choices[0].finish.usage.resumes for answer in answers]
        assert sorted(resumes) == [0, 1], "the worker is not lost"


async def test_a_fault_of_the_router_does_not_lose_it_the_worker_that_comes_next(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(model, worker_grace=10) as it:
        lost = it.router.dispatcher.worker_lost

        def faulty(worker: Worker) -> None:
            lost(worker)
            raise RuntimeError

        monkeypatch.setattr(it.router.dispatcher, "worker_lost", faulty)
        await it.decodes[0].die()
        reborn = FakeWorker(DECODE)
        await reborn.start(it.decodes[0].address)
        it.decodes[:] = [reborn]
        assert list((await it.generate()).choices[0].token_ids) == expected(8)


async def test_a_stream_that_cannot_be_written_to_is_opened_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(model, worker_grace=10) as it:
        next_message, calls = Outbox.next_message, itertools.count()

        async def faulty(outbox: Outbox) -> worker_pb2.RouterMessage:
            assert next(calls), "the first fails"
            return await next_message(outbox)

        monkeypatch.setattr(Outbox, "next_message", faulty)
        choice = (await it.generate()).choices[0]
        assert list(choice.token_ids) == expected(8)
        assert choice.finish.usage.resumes == 1


async def test_the_first_message_of_a_worker_is_checked_as_all_are(model: Path) -> None:
    class Odd(FakeWorker):
        async def _beat(self) -> None:
            self.send(cache=worker_pb2.CacheChanges(published=b"short"))
            await super()._beat()

    with capture_logs() as logs:
        async with cluster(model, prefills=[Odd(PREFILL)], ready=False) as it:
            await eventually(lambda: any(entry["event"] == "worker lost" for entry in logs))
            assert it.router.dispatcher.workers.count(PREFILL) == 0
    reason = next(entry["reason"] for entry in logs if entry["event"] == "worker lost")
    assert reason == "it broke the protocol: hashes of 16 bytes came as 5 bytes"


async def test_what_a_worker_sends_that_cannot_be_parsed_breaks_the_protocol(model: Path) -> None:
    async with cluster(model, decodes=[Script(stop_after=3), Script()]) as it:
        broken = it.decodes[0]
        answers = [asyncio.ensure_future(it.generate()) for _ in range(4)]
        await eventually(lambda: any(running.steps == 3 for running in broken.running.values()))
        with capture_logs() as logs:
            no_message: Any = BytesValue(value=b"\xff")  # on the wire: a hello that is cut short
            broken._out.put_nowait(no_message)
            for answer in await asyncio.gather(*answers):
                assert list(answer.choices[0].token_ids) == expected(8)
        (reason,) = [entry["reason"] for entry in logs if entry["event"] == "worker lost"]
    assert reason == "it broke the protocol: what it sent is no message"
    assert not [entry for entry in logs if entry["event"] == "link failed"], "it is no fault of the router"


async def test_a_worker_that_has_drained_is_not_called_lost(model: Path) -> None:
    drained, killed = FakeWorker(PREFILL), FakeWorker(PREFILL)
    with capture_logs() as logs:
        async with cluster(model, prefills=[drained, killed]) as it:
            drained.ready = False
            drained.report()
            await eventually(lambda: it.router.dispatcher.workers.count(PREFILL) == 1)
            for worker in (drained, killed):
                await worker.die()
            await eventually(lambda: not it.router.dispatcher.workers.count(PREFILL))
            await eventually(lambda: len(_gone(logs)) == 2)
    assert _gone(logs) == {drained.address: "worker left", killed.address: "worker lost"}


def _gone(logs: list[Any]) -> dict[str, str]:
    return {entry["worker"]: entry["event"] for entry in logs if entry["event"] in ("worker left", "worker lost")}


@pytest.mark.parametrize("role", [PREFILL, DECODE])
async def test_a_first_token_without_the_logprobs_that_were_asked_for_breaks_the_protocol(
    model: Path, role: inference_pb2.WorkerRole.ValueType
) -> None:
    both: dict[str, Any] = {"prefill_tokens": 1024} if role == DECODE else {}
    odd = FakeWorker(role, Script(no_logprobs=1), **both)
    sides: dict[str, Any] = {"prefills": [odd]} if role == PREFILL else {"decodes": [odd]}
    with capture_logs() as logs:
        async with cluster(model, worker_grace=10, **sides) as it:
            asked = inference_pb2.ResponseOptions(logprobs=0)
            answers = await asyncio.gather(*(it.generate(response=asked) for _ in range(4)))
        choices = [answer.choices[0] for answer in answers]
        assert [list(choice.token_ids) for choice in choices] == [expected(8)] * 4
        assert [[entry.logprob for entry in choice.logprobs] for choice in choices] == [[-0.5] * 8] * 4
        assert any(choice.finish.usage.resumes for choice in choices)
    lost = [entry["reason"] for entry in logs if entry["event"] == "worker lost"]
    assert lost == ["it broke the protocol: a token came without the log-probabilities that were asked for"]


@pytest.mark.parametrize(
    "odd",
    [{"block_ids": [0] * 200_000}, {"generations": [1]}, {"pool": worker_pb2.PoolHandle(descriptor=b"x" * 1_000_000)}],
    ids=["blocks", "generations", "pool"],
)
async def test_kv_that_is_nowhere_is_the_fault_of_the_worker_that_names_it(model: Path, odd: dict[str, Any]) -> None:
    """Not of the decode worker that it would be passed on to."""
    odd = dict(odd)

    class Odd(FakeWorker):
        async def _first_token(self, asked: worker_pb2.Prefill | worker_pb2.Reserve, **where: Any) -> int | None:
            for name, value in odd.items():
                where["kv"].ClearField(name)
                where["kv"].MergeFrom(worker_pb2.KvLocation(**{name: value}))
            odd.clear()
            return await super()._first_token(asked, **where)

    with capture_logs() as logs:
        async with cluster(model, prefills=[Odd(PREFILL), Odd(PREFILL)]) as it:
            assert list((await it.generate()).choices[0].token_ids) == expected(8)
            assert len(it.decodes[0].starts) == 1
            assert not any(worker.circuit._failures for worker in it.router.dispatcher.workers.of(DECODE))
    (lost,) = [entry for entry in logs if entry["event"] == "worker lost"]
    assert lost["reason"].startswith("it broke the protocol: ")


@pytest.mark.parametrize("hello", [{"fingerprint": "e" * 32}, {"block_size": 32}])
async def test_workers_that_come_back_as_another_kind_serve_what_has_no_output_yet(
    model: Path, hello: dict[str, Any]
) -> None:
    busy = FakeWorker(DECODE, Script(stop_after=3), max_batch=1)
    async with cluster(model, decodes=[busy], worker_grace=10) as it:
        begun = asyncio.ensure_future(it.generate(max_tokens=100, prompt=tuple(range(40, 104))))
        await eventually(lambda: stuck(it, "decode"))
        waiting = asyncio.ensure_future(it.generate(max_tokens=100))
        await eventually(lambda: it.router.dispatcher.queued == 1)
        for worker in it.workers:
            await worker.die()
        await eventually(lambda: not it.router.registry.connected)
        it.prefills[:], it.decodes[:] = [FakeWorker(PREFILL, **hello)], [FakeWorker(DECODE, **hello)]
        for worker in it.workers:
            it.router.registry._keep_link((await worker.start(), worker.role))
        assert list((await waiting).choices[0].token_ids) == expected(100)
        if "block_size" in hello:
            assert list((await begun).choices[0].token_ids) == expected(100, range(40, 104))
            assert {len(p.sequence.block_hashes) // 16 for p in it.prefills[0].prefills} == {0, 2}
        else:
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await begun
            assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
            assert "other weights" in str(failed.value.details())
            roots = {cache_root("e" * 32, "")}
            assert {prefill.sequence.cache_root for prefill in it.prefills[0].prefills} == roots
