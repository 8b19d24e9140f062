"""Who is let in as a worker, and how workers are found."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from common.model import vocabulary
from router.cluster import registry, worker_link
from tests.router.cluster import PROMPT, Cluster, cluster, eventually, expected
from tests.router.fake_worker import DECODE, PREFILL, FakeWorker, Script
from twostroke.v1 import inference_pb2 as pb
from twostroke.v1 import worker_pb2, worker_pb2_grpc

LARGE_POOL = worker_pb2.PoolHandle(
    descriptor=b"x" * 5_000_000, layout=worker_pb2.KvLayout(num_blocks=4096, block_size=16)
)


async def test_workers_are_not_called_through_a_proxy(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with cluster(model) as it:
        assert it.introduced()


@pytest.mark.parametrize(
    ("hello", "sentence"),
    [
        ({"fingerprint": "0" * 32}, f"its fingerprint is '{'0' * 32}', and that of"),
        ({"dtype": "bfloat16"}, "its dtype is 'bfloat16', and that of"),
        ({"dtype": "bfloat16", "fingerprint": "0" * 32}, "its dtype is 'bfloat16', and that of"),
        ({"block_size": 32}, "its block_size is 32, and that of"),
        ({"vocab_size": 151936}, "the vocab_size of its model 'fake' is 151936, and that of the router's '"),
        ({"eos_token_ids": [7]}, "the eos_token_ids of its model 'fake' is [7], and that of the router's '"),
        (
            {"pool": LARGE_POOL},
            f"the handle of its pool has {LARGE_POOL.ByteSize()} bytes; at most 4194304 are allowed",
        ),
        ({"vocabulary": "0" * 32}, f"the vocabulary of its model 'fake' is '{'0' * 32}', and that of the router's '"),
    ],
)
async def test_a_worker_that_does_not_fit_is_refused_with_both_values(
    model: Path, hello: dict[str, Any], sentence: str
) -> None:
    with capture_logs() as logs:
        async with cluster(model) as it:
            odd = FakeWorker(DECODE, **hello)
            it.router.registry._keep_link((await odd.start(), DECODE))
            await eventually(lambda: any(entry["event"] == "worker refused" for entry in logs))
            assert len(it.router.dispatcher.workers.all()) == 2
            (problem,) = (await it.stub.GetLoad(pb.GetLoadRequest())).problems
            assert (problem.address, problem.role) == (odd.address, DECODE)
            assert problem.reason.startswith(f"refused: {sentence}")
            await eventually(lambda: len(odd.refusals) == 1)
            await odd.die()
    refusal = next(entry for entry in logs if entry["event"] == "worker refused")
    assert refusal["reason"].startswith(sentence)
    assert odd.refusals == [refusal["reason"]]


async def test_a_refusal_is_logged_once_though_the_worker_is_asked_again(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_link, "PAUSE_AFTER_REFUSAL", 0.02)
    with capture_logs() as logs:
        async with cluster(model) as it:
            odd = FakeWorker(DECODE, dtype="bfloat16")
            it.router.registry._keep_link((await odd.start(), DECODE))
            await eventually(lambda: len(odd.refusals) >= 3)
            assert len((await it.stub.GetLoad(pb.GetLoadRequest())).problems) == 1
            await odd.die()
    told = [entry["event"] for entry in logs if entry.get("worker") == odd.address]
    assert told[0] == "worker refused"
    assert "worker refused" not in told[1:]


async def test_refused_workers_take_over_once_those_that_they_do_not_fit_are_gone(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a cluster is moved to other weights."""
    monkeypatch.setattr(worker_link, "PAUSE_AFTER_REFUSAL", 60)
    async with cluster(model, worker_grace=20) as it:
        before, after = it.workers, [FakeWorker(role, fingerprint="e" * 32) for role in (PREFILL, DECODE)]
        for worker in after:
            address = await worker.start()
            it.router.registry.register(
                worker_pb2.RegisterRequest(address=address, instance=worker.instance, role=worker.role)
            )
        await eventually(lambda: len(list(it.router.registry.problems())) == 2)
        it.prefills, it.decodes = after[:1], after[1:]
        for worker in before:
            await worker.die()
        assert list((await it.generate()).choices[0].token_ids) == expected(8)


async def test_a_restart_with_the_right_settings_is_noticed_at_once(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_link, "PAUSE_AFTER_REFUSAL", 60)
    async with cluster(model, prefills=[FakeWorker(PREFILL, vocab_size=1)], ready=False) as it:
        wrong = it.prefills[0]
        await eventually(lambda: len(wrong.refusals) == 1)
        await wrong.die()
        right = FakeWorker(PREFILL)
        it.prefills[:] = [right]
        await right.start(wrong.address)
        it.router.registry.register(
            worker_pb2.RegisterRequest(address=wrong.address, instance=right.instance, role=PREFILL)
        )
        await eventually(it.introduced)


async def test_a_first_worker_of_another_model_is_refused_too(model: Path) -> None:
    with capture_logs() as logs:
        workers = [FakeWorker(role, vocab_size=151936) for role in (PREFILL, DECODE)]
        async with cluster(model, prefills=workers[:1], decodes=workers[1:], ready=False) as it:
            await eventually(lambda: sum(entry["event"] == "worker refused" for entry in logs) == 2)
            assert not it.router.dispatcher.workers.ready


async def test_a_worker_says_the_same_of_the_model_as_the_router(model: Path) -> None:
    async with cluster(model, prefills=[FakeWorker(PREFILL, vocabulary=vocabulary.digest(model))]) as it:
        assert list((await it.generate()).choices[0].token_ids) == expected(8)


async def test_a_worker_of_another_version_is_used_and_warned_of(model: Path) -> None:
    with capture_logs() as logs:
        async with cluster(model, prefills=[FakeWorker(PREFILL, version="0.0.1")]) as it:
            assert list((await it.generate()).choices[0].token_ids) == expected(8)
    warning = next(entry for entry in logs if entry["event"] == "worker of another version")
    assert warning["version"] == "0.0.1"


async def test_a_role_that_was_named_wrongly_is_refused(model: Path) -> None:
    with capture_logs() as logs:
        async with cluster(model, decodes=[FakeWorker(PREFILL)], ready=False) as it:
            await eventually(lambda: any(entry["event"] == "worker refused" for entry in logs))
            assert not it.router.dispatcher.workers.ready


async def test_a_worker_is_connected_under_one_address_only(model: Path) -> None:
    with capture_logs() as logs:
        async with cluster(model) as it:
            port = it.decodes[0].address.rpartition(":")[2]
            it.router.registry._keep_link((f"localhost:{port}", DECODE))
            await eventually(lambda: any(entry["event"] == "worker refused" for entry in logs))
            assert len(it.router.dispatcher.workers.all()) == 2


async def test_workers_that_make_themselves_known_are_used(model: Path) -> None:
    async with cluster(model, prefills=[], decodes=[], worker_grace=5) as it:
        stub = worker_pb2_grpc.RegistryStub(it.channel)
        for role, workers in ((PREFILL, it.prefills), (DECODE, it.decodes)):
            worker = FakeWorker(role)
            workers.append(worker)
            message = worker_pb2.RegisterRequest(address=await worker.start(), instance=worker.instance, role=role)
            assert (await stub.Register(message)).interval_ms == 2000
        assert list((await it.generate()).choices[0].token_ids) == expected(8)


@pytest.mark.parametrize(
    ("limits", "answer"),
    [
        ({"max_tokens": None}, [*expected(80 - len(PROMPT))]),
        ({"max_tokens": 60}, [*expected(60)]),
        ({"max_tokens": 61}, "stopping.max_tokens: 61 and the prompt's 20 are more than 80, for"),
        ({"max_tokens": None, "prompt": range(40, 120)}, "input: the prompt has 80 tokens; the smallest worker"),
    ],
)
async def test_what_comes_before_the_workers_is_answered_as_what_comes_after(
    model: Path, limits: dict[str, Any], answer: list[int] | str
) -> None:
    async def ask(it: Cluster) -> list[int] | str:
        try:
            return list((await it.generate(**limits)).choices[0].token_ids)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name} {error.details()}"

    async with cluster(model, prefills=[], decodes=[], worker_grace=10) as it:
        early = asyncio.ensure_future(ask(it))
        await eventually(lambda: it.router.dispatcher.queued == 1)
        it.prefills.append(FakeWorker(PREFILL))
        it.router.registry._keep_link((await it.prefills[0].start(), PREFILL))
        await eventually(lambda: len(it.router.dispatcher.workers.all()) == 1)
        it.decodes.append(FakeWorker(DECODE, max_length=80))
        it.router.registry._keep_link((await it.decodes[0].start(), DECODE))
        answers = [await early, await ask(it)]
        if isinstance(answer, str):
            assert all(str(got).startswith(f"INVALID_ARGUMENT {answer}") for got in answers), answers
        else:
            assert answers == [answer, answer]


async def test_workers_may_listen_on_sockets_of_this_machine(model: Path, tmp_path: Path) -> None:
    paths = f"unix:{tmp_path}/prefill", f"unix-abstract:{tmp_path}/decode"
    workers = FakeWorker(PREFILL), FakeWorker(DECODE)
    for worker, path in zip(workers, paths, strict=True):
        await worker.start(path)
    async with cluster(model, prefills=[], decodes=[], worker_grace=5) as it:
        it.prefills.append(workers[0])
        it.decodes.append(workers[1])
        message = worker_pb2.RegisterRequest(address=paths[0], instance=workers[0].instance, role=PREFILL)
        await worker_pb2_grpc.RegistryStub(it.channel).Register(message)
        it.router.registry._named.append((paths[1], DECODE))
        await it.router.registry._look_up()
        assert list((await it.generate()).choices[0].token_ids) == expected(8)


async def test_a_restart_is_noticed_by_its_registration(model: Path) -> None:
    """The old instance's stream may look alive, as after a power cut: the new instance's word ends it."""
    async with cluster(model) as it:
        worker = it.decodes[0]
        worker.instance = worker.hello.instance = worker.hello.pool.instance = "restarted"
        message = worker_pb2.RegisterRequest(address=worker.address, instance="restarted", role=DECODE)
        await worker_pb2_grpc.RegistryStub(it.channel).Register(message)
        instances = it.router.dispatcher.workers.all
        await eventually(lambda: "restarted" in {worker.instance for worker in instances()})
        assert list((await it.generate()).choices[0].token_ids) == expected(8)


async def test_a_worker_elsewhere_that_names_the_same_address_ends_its_requests_no_more_than_once(model: Path) -> None:
    with capture_logs() as logs:
        async with cluster(model, decodes=[Script(step_seconds=0.02)]) as it:
            register = worker_pb2_grpc.RegistryStub(it.channel).Register
            worker = it.decodes[0]
            answer = asyncio.ensure_future(it.generate(max_tokens=60))
            while not answer.done():
                for instance in (worker.instance, "elsewhere"):
                    message = worker_pb2.RegisterRequest(address=worker.address, instance=instance, role=DECODE)
                    await register(message)
                    await asyncio.sleep(0.05)
            choice = (await answer).choices[0]
            assert list(choice.token_ids) == expected(60)
            assert choice.finish.usage.resumes == 1
            said = [entry for entry in logs if entry["log_level"] == "error"]
            assert [(entry["worker"], entry["other"]) for entry in said] == [(worker.address, "elsewhere")]
            await worker.die()
            it.decodes[0] = FakeWorker(DECODE, instance="elsewhere")  # now it is here
            await it.decodes[0].start(worker.address)
            instances = it.router.dispatcher.workers.all
            await eventually(lambda: "elsewhere" in {worker.instance for worker in instances()})


@pytest.mark.parametrize(
    ("address", "role", "sentence"),
    [
        ("nowhere", PREFILL, "address: 'nowhere' is none. Must be host:port"),
        ("here:1", 0, "role: must be prefill or decode"),
    ],
)
async def test_a_wrong_registration_is_refused(model: Path, address: str, role: int, sentence: str) -> None:
    async with cluster(model) as it:
        message = worker_pb2.RegisterRequest(address=address, role=role)  # type: ignore[arg-type]
        with pytest.raises(grpc.aio.AioRpcError, match=sentence) as refused:
            await worker_pb2_grpc.RegistryStub(it.channel).Register(message)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("name", [".svc:8601", "decode:port", "no.such.host.invalid:8601"])
async def test_a_name_that_cannot_be_looked_up_costs_no_other_worker(
    model: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "DNS_INTERVAL", 0.05)
    look_ups, addresses = [], registry._addresses

    async def counted(name: str) -> list[str]:
        look_ups.append(name)
        return await addresses(name)

    monkeypatch.setattr(registry, "_addresses", counted)
    with capture_logs() as logs:
        async with cluster(model) as it:
            it.router.registry._named.insert(0, (name, DECODE))
            await eventually(lambda: look_ups.count(name) >= 4)
            assert sum(entry["event"] == "cannot look up" for entry in logs) == 1
            assert list((await it.generate()).choices[0].token_ids) == expected(8)
            assert len(it.router.dispatcher.workers.all()) == 2


async def test_a_name_that_is_looked_up_for_long_has_no_other_forgotten(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "DNS_INTERVAL", 0.01)
    monkeypatch.setattr(registry, "REGISTRATION_LASTS", 0.1)
    answered = 0

    async def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        nonlocal answered
        await asyncio.sleep(0.2)
        answered += 1
        raise OSError("no answer")

    with capture_logs() as logs:
        async with cluster(model, worker_grace=10) as it:
            monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
            it.router.registry._named.append(("decode:1", DECODE))
            await it.decodes[0].die()
            await eventually(lambda: answered >= 3)
            await it.decodes[0].start(it.decodes[0].address)
            await eventually(it.introduced)
    assert "worker forgotten" not in [entry["event"] for entry in logs]


async def test_a_name_is_looked_up_until_it_is_there(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "DNS_INTERVAL", 0.05)
    loop = asyncio.get_running_loop()
    async with cluster(model, decodes=[], ready=False, worker_grace=5) as it:
        worker = FakeWorker(DECODE)
        it.decodes.append(worker)
        port = int((await worker.start()).rpartition(":")[2])
        tries = 0

        async def getaddrinfo(host: str, asked: int, **_: Any) -> list[Any]:
            nonlocal tries
            tries += 1
            if tries < 3:
                raise OSError("not yet")
            return [(None, None, None, "", ("127.0.0.1", asked))]

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
        it.router.registry._named.append((f"decode:{port}", DECODE))
        assert list((await it.generate()).choices[0].token_ids) == expected(8)
        assert tries >= 3
