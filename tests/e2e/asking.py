"""Asking clusters, and looking after them."""

import threading
import time
from collections.abc import Sequence

from tests.e2e import reference
from tests.e2e.cluster import Cluster
from tests.e2e.prompts import prompts
from tests.e2e.reference import assert_greedy
from twostroke import Client, Generation, Piece, TwostrokeError

LONG, SHORT = prompts((800, 20), seed=8)


def assert_all_greedy(asked: Sequence[Sequence[int]], answers: Sequence[Generation], count: int) -> None:
    assert [len(answer.token_ids) for answer in answers] == [count] * len(asked)
    reference.assert_all_greedy(asked, [answer.token_ids for answer in answers])


class Asking(threading.Thread):
    """One request under way in a thread: its pieces, and how it ended. Greedy, and past every end-of-sequence token."""

    def __init__(self, client: Client, prompt: Sequence[int], max_tokens: int = 400) -> None:
        super().__init__(daemon=True)
        self.pieces: list[Piece] = []
        self.error: TwostrokeError | None = None
        self._client = client
        self._prompt, self._max_tokens = prompt, max_tokens
        self._salt = f"{prompt[:3]} {time.monotonic_ns()}"  # so that the prompt is computed, whatever came before
        self.start()

    def run(self) -> None:
        try:
            for piece in self._client.stream(
                self._prompt, max_tokens=self._max_tokens, temperature=0, ignore_eos=True, cache_salt=self._salt
            ):
                self.pieces.append(piece)
        except TwostrokeError as error:
            self.error = error

    @property
    def tokens(self) -> list[int]:
        return [token for piece in list(self.pieces) for token in piece.token_ids]

    @property
    def resumes(self) -> int:
        """Of a request that is answered."""
        finish = self.pieces[-1].finish
        assert finish is not None, self.error
        return finish.usage.resumes


def reach(cluster: Cluster, asking: Asking, state: str) -> None:
    """Returns when the request is in `state`."""
    if state == "prefilling":
        cluster.wait_for(lambda: any(worker.running for worker in cluster.workers("prefill")))
    else:
        cluster.wait_for(lambda: len(asking.tokens) >= 3, seconds=30)


def assert_well(cluster: Cluster) -> None:
    cluster.assert_blocks_home()
    answer = cluster.client.generate(SHORT, max_tokens=4, temperature=0, ignore_eos=True, timeout=20)
    assert_greedy(SHORT, answer.token_ids)
    cluster.assert_blocks_home()
