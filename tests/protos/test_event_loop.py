import asyncio
import socket
from functools import partial
from typing import Any

import grpc
import pytest

from twostroke import event_loop


class PollerCompletionQueue:
    """In gRPC's place: bytes come from elsewhere, and a reader takes one at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.read_end, self.write_end = socket.socketpair()
        self.read_end.setblocking(False)
        self.write_end.setblocking(False)
        self.calls = 0
        loop.add_reader(self.read_end, partial(self._handle_events, loop))

    def _handle_events(self, loop: asyncio.AbstractEventLoop) -> None:
        self.calls += 1
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


def test_the_installed_grpc_is_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another name for the class in gRPC, streams would stand still again, and nothing else would fail."""
    turns = 0
    leave_one_byte = event_loop._leave_one_byte

    def counting(*args: Any) -> None:
        nonlocal turns
        turns += 1
        leave_one_byte(*args)

    async def echo(request: bytes, context: object) -> bytes:
        return request

    async def main() -> None:
        server = grpc.aio.server()
        methods: Any = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", methods),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call: Any = channel.unary_unary("/test.Echo/Echo")
            answers = await asyncio.gather(*(call(str(number).encode()) for number in range(500)))
        await server.stop(0)
        assert answers == [str(number).encode() for number in range(500)]

    monkeypatch.setattr(event_loop, "_leave_one_byte", counting)
    event_loop.run(main())
    assert turns > 0
