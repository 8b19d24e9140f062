"""A worker's `WorkerService` without gRPC and its thread: links take the place of streams."""

import queue
from collections import defaultdict

from common.worker.unsent import Unsent
from common.worker.worker_service import Received, WorkerService
from twostroke.v1 import worker_pb2 as pb


class Wire(WorkerService):
    def __init__(self, address: str) -> None:
        self.address = address
        self._inbox = queue.SimpleQueue()
        self._outgoing = defaultdict(pb.WorkerMessage)
        self._connections = {}
        self._next_connection = 0

    def receive(self, timeout: float) -> list[Received]:
        return super().receive(0)  # no time goes by while an engine waits

    def flush(self) -> None:
        outgoing, self._outgoing = self._outgoing, defaultdict(pb.WorkerMessage)
        self._hand_over(outgoing)

    def connect(self) -> tuple[int, Unsent]:
        """A new connection, and what the engine has to say on it."""
        connection, self._next_connection = self._next_connection, self._next_connection + 1
        unsent = self._connections[connection] = Unsent(cut_off=lambda: None)
        self.put(connection, pb.RouterMessage())
        return connection, unsent

    def put(self, connection: int, message: pb.RouterMessage) -> None:
        self._inbox.put(Received(connection, message))

    def disconnect(self, connection: int) -> None:
        del self._connections[connection]
        self._inbox.put(Received(connection, None))
