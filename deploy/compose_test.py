"""The client of deploy/compose_test.sh: checks the cluster behind TWOSTROKE_PORT at each stage of the test."""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Semaphore

from twostroke import Client
from twostroke.v1 import inference_pb2 as pb

TARGET = f"127.0.0.1:{os.environ['TWOSTROKE_PORT']}"
NAMES = ("Paris", "Mercury", "Rex", "Java", "Victoria", "Python", "Amazon", "Orion")
PROMPTS = tuple(f"{name} is the name of a" for name in NAMES)
LONG = 96  # tokens of the answers during which workers are killed


def answers(client: Client, tokens: int, progress: Semaphore | None = None) -> list[tuple[int, ...]]:
    """Greedy answers to all prompts, asked at once. `progress` is released with every piece of an answer."""

    def ask(prompt: str) -> tuple[int, ...]:
        answer: list[int] = []
        for piece in client.stream(prompt, max_tokens=tokens, temperature=0, ignore_eos=True, timeout=240):
            answer.extend(piece.token_ids)
            if progress is not None:
                progress.release()
        return tuple(answer)

    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        return list(threads.map(ask, PROMPTS))


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"{what}: not within {seconds:g} s")
        time.sleep(0.2)
    print(f"{what}: yes")


def workers(client: Client) -> Counter[str]:
    """Ready workers by role, each instance counted once."""
    load = client.load().workers
    assert len({worker.instance for worker in load}) == len(load), "a worker is there twice"
    return Counter(
        pb.WorkerRole.Name(worker.role).removeprefix("WORKER_ROLE_").lower() for worker in load if worker.ready
    )


def blocks_are_home(client: Client) -> bool:
    return all(worker.blocks.in_use == 0 and worker.leases == 0 for worker in client.load().workers)


def check(client: Client, each: int) -> None:
    wait_for(lambda: workers(client) == {"prefill": each, "decode": each}, f"{each} + {each} workers, none twice")
    first, again = answers(client, 32), answers(client, 32)
    assert first == again, "the same prompts had other answers"
    print(repr(client.chat("Name three primary colors.", max_tokens=40, temperature=0).text))
    wait_for(lambda: blocks_are_home(client), "all blocks home")


def survive(client: Client, compose: list[str]) -> None:
    expected, progress = answers(client, LONG), Semaphore(0)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(answers, client, LONG, progress)
        for _ in range(LONG * len(PROMPTS) // 4):
            progress.acquire(timeout=60)
        for role in ("decode", "prefill"):
            container = subprocess.run([*compose, "ps", "--quiet", role], check=True, capture_output=True, text=True)
            subprocess.run(["docker", "kill", container.stdout.split()[0]], check=True, stdout=subprocess.DEVNULL)
        assert not running.done(), "the requests were over too soon"
        assert running.result() == expected, "an answer changed when its workers were killed"
    print("requests that ran meanwhile have the same answers")
    wait_for(lambda: workers(client) == {"prefill": 1, "decode": 1}, "1 + 1 workers are left")
    assert answers(client, 32) == [answer[:32] for answer in expected], "an answer changed afterwards"
    wait_for(lambda: blocks_are_home(client), "all blocks home")


def main() -> None:
    with Client(TARGET) as client:
        client.wait_until_ready(60)
        match sys.argv[1:]:
            case ["one-pair"]:
                check(client, 1)
            case ["two-pairs"]:
                check(client, 2)
            case ["survive", *compose]:
                survive(client, compose)


if __name__ == "__main__":
    main()
