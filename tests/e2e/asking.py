"""One request under way in a thread."""

import threading
import time
from collections.abc import Sequence

from twostroke import Client, Piece, TwostrokeError


class Asking(threading.Thread):
    """Greedy, and past every end-of-sequence token. Holds the pieces that came so far, and how it ended."""

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
