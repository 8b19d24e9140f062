"""What was seen of one request."""

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Record:
    """Times are seconds since the load began. `due` is when the request should have been sent. Latencies count from
    then, so that a load generator that falls behind does not hide it."""

    due: float
    ended: float
    prompt_tokens: int
    deltas: tuple[tuple[float, int], ...]
    """Time and number of tokens of each message with tokens."""
    prefill_cached_tokens: int = 0
    decode_cached_tokens: int = 0
    resumes: int = 0
    error: str | None = None
    """The gRPC status code of a request that failed."""

    @property
    def output_tokens(self) -> int:
        return sum(count for _, count in self.deltas)

    @property
    def end_to_end(self) -> float:
        return self.ended - self.due

    @property
    def ttft(self) -> float | None:
        """Time to first token."""
        return self.deltas[0][0] - self.due if self.deltas else None

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first message; None if nothing came after it."""
        later = self.output_tokens - self.deltas[0][1] if self.deltas else 0
        return (self.deltas[-1][0] - self.deltas[0][0]) / later if later else None

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: the gaps between messages with tokens. A message of several tokens ends one gap,
        because a reader sees them all at once; dividing the gap among them would hide the stall before it."""
        return [later - earlier for (earlier, _), (later, _) in pairwise(self.deltas)]
