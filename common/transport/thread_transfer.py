"""A transfer that a thread of the reader's carries out."""

from concurrent.futures import Future

from common.transport.interface import TransferFailed


class ThreadTransfer:
    """See interface.Transfer.

    Args:
        work: what the thread does; its result is the milliseconds that the copy took.
        doing: says what fails if that raises, as in "copying from the peer's shared memory".
    """

    def __init__(self, work: Future[float], doing: str) -> None:
        self._work = work
        self._doing = doing

    @property
    def milliseconds(self) -> float:
        return self._work.result()

    def done(self) -> bool:
        if not self._work.done():
            return False
        self.wait()
        return True

    def wait(self) -> None:
        try:
            self._work.result()
        except Exception as error:
            raise TransferFailed(f"{self._doing} failed: {error!r}") from error
