import asyncio
import multiprocessing
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import grpc
import pytest

from twostroke import event_loop


class PollerCompletionQueue:
    """In gRPC's place: bytes come from elsewhere, and a reader takes one at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, others: int = 0) -> None:
        self.others = others  # loops of the process that are faster than this one
        self.read_end, self.write_end = socket.socketpair()
        self.read_end.setblocking(False)
        self.write_end.setblocking(False)
        self.calls = 0
        loop.add_reader(self.read_end, partial(self._handle_events, loop))

    def _handle_events(self, loop: asyncio.AbstractEventLoop) -> None:
        self.calls += 1
        for _ in range(self.others):
            self.read_end.recv(1)
        assert len(self.read_end.recv(1)) == 1

    async def until(self, calls: int) -> None:
        while self.calls < calls:  # noqa: ASYNC110 - the turns are what is tested
            await asyncio.sleep(0)

    def write_until_full(self) -> int:
        count = 0
        try:
            while True:
                count += self.write_end.send(b"1")
        except BlockingIOError:
            return count


@pytest.mark.parametrize("bytes_written", [1, 2, None])
def test_all_wakeups_are_taken_in_one_turn(bytes_written: int | None) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        queue = PollerCompletionQueue(loop)
        for turn in range(1, 4):
            if bytes_written is None:
                assert queue.write_until_full() > 100
            else:
                queue.write_end.send(b"1" * bytes_written)
            await queue.until(turn)
        for _ in range(5):
            await asyncio.sleep(0)
        assert queue.calls == 3, "called for bytes that it need not read"
        loop.remove_reader(queue.read_end)
        queue.read_end.close()
        queue.write_end.close()

    event_loop.run(main())


def test_a_loop_that_finds_its_wakeup_taken_by_another_leaves_it_at_that() -> None:
    problems: list[Any] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: problems.append(context))
        queue = PollerCompletionQueue(loop, others=1)
        queue.write_end.send(b"1")
        await queue.until(1)
        for _ in range(5):
            await asyncio.sleep(0)
        assert queue.calls == 1
        loop.remove_reader(queue.read_end)
        queue.read_end.close()
        queue.write_end.close()

    event_loop.run(main())
    assert problems == []


async def echo(request: bytes, context: object) -> bytes:
    return request


@asynccontextmanager
async def echoing() -> AsyncIterator[Any]:
    """A call to a server of this loop."""
    server = grpc.aio.server()
    methods: Any = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        yield channel.unary_unary("/test.Echo/Echo")
    await server.stop(0)


def close_loops_with_calls_under_way() -> None:
    async def leave_calls() -> None:
        async with echoing() as call:
            left.extend(call(b"") for _ in range(60))
            await asyncio.sleep(0.001)
            raise LookupError

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        async with echoing() as call:
            assert await asyncio.wait_for(call(b"here"), timeout=10) == b"here"

    left: list[Any] = []
    for _ in range(20):
        loop = event_loop.EventLoop()
        with pytest.raises(LookupError):
            loop.run_until_complete(leave_calls())
        loop.close()
        event_loop.run(main())


def test_what_a_closed_loop_left_does_not_hold_up_the_next() -> None:
    """The gRPC of a process is shared by its loops, and stumbles over operations of one that is closed. So in a process
    of its own."""
    process = multiprocessing.get_context("spawn").Process(target=close_loops_with_calls_under_way)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_loops_of_two_threads_work_side_by_side() -> None:
    problems: list[Any] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
        async with echoing() as call:
            for _ in range(20):
                await asyncio.wait_for(asyncio.gather(*(call(b"") for _ in range(50))), timeout=20)

    with ThreadPoolExecutor(2) as pool:
        for running in [pool.submit(event_loop.run, main()) for _ in range(2)]:
            running.result()
    assert problems == []


def test_the_installed_grpc_is_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another name for the class in gRPC, streams would stand still again, and nothing else would fail."""
    turns = 0
    leave_one_byte = event_loop._leave_one_byte

    def counting(*args: Any) -> None:
        nonlocal turns
        turns += 1
        leave_one_byte(*args)

    async def main() -> None:
        async with echoing() as call:
            answers = await asyncio.gather(*(call(str(number).encode()) for number in range(500)))
        assert answers == [str(number).encode() for number in range(500)]

    monkeypatch.setattr(event_loop, "_leave_one_byte", counting)
    event_loop.run(main())
    assert turns > 0
