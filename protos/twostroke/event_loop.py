"""An asyncio event loop on which hundreds of gRPC calls at once go on at full speed. Not for Windows."""

import asyncio
import fcntl
import socket
import struct
import termios
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on an `EventLoop`."""
    with asyncio.Runner(loop_factory=EventLoop) as runner:
        return runner.run(main)


class EventLoop(asyncio.SelectorEventLoop):
    """Takes in all of gRPC's wake-ups in one turn.

    A thread of grpc.aio writes one byte into a socket for every operation that is complete. Its reader takes in all
    complete operations, but one byte: on a loop with much to do, where several complete per turn, bytes pile up. Once
    there are 278 (Linux), the thread waits until 209 are gone, a turn for each of them, and all calls of the process
    wait for the thread. Here the bytes beyond the first are taken out before gRPC's reader is called.
    """

    def add_reader(self, fd: Any, callback: Callable[[Unpack[Ts]], Any], *args: *Ts) -> None:
        if isinstance(fd, socket.socket) and _is_of_grpc(callback):
            super().add_reader(fd, partial(_leave_one_byte, fd, callback, *args))
        else:
            super().add_reader(fd, callback, *args)


def _is_of_grpc(callback: Callable[..., object]) -> bool:
    function = callback.func if isinstance(callback, partial) else callback
    return type(getattr(function, "__self__", None)).__name__ == "PollerCompletionQueue"


# The loops of a process share the socket. Two that both took out "all but one" could leave none.
_taking = threading.Lock()


def _leave_one_byte(wakeups: socket.socket, callback: Callable[..., object], *args: Any) -> None:
    with _taking, suppress(BlockingIOError):  # the last byte may be read at any moment
        (count,) = struct.unpack("i", fcntl.ioctl(wakeups, termios.FIONREAD, bytes(4)))
        if count > 1:
            wakeups.recv(count - 1)
    try:
        callback(*args)
    except BlockingIOError:
        return  # another loop was faster: it read the last byte, and takes in what is complete for all loops
    except BaseException:
        # It stops at an operation of a loop that is closed, say. The bytes of those behind it are gone.
        asyncio.get_running_loop().call_soon(_leave_one_byte, wakeups, callback, *args)
        raise
