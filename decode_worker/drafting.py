"""When decode steps draft: where more tokens a second come of it, which is found by trying both ways."""

from collections import defaultdict, deque
from collections.abc import Sequence as Items

from decode_worker.scheduler import Sequence

# Most rows that go through the model in a step with drafts. With more a step is bound by arithmetic, and drafts cost
# as much as other sequences' tokens would.
MOST_ROWS = 256

# Steps of each kind that are remembered; the shortest counts. With another process on the same GPU some take longer.
REMEMBERED = 8

# After so many steps of one kind the other is tried again: sequences grow, and come to repeat themselves.
RETRY_STEPS = 64

# Weight of a sequence's last step in how many of its drafts are kept.
NEWEST = 0.25


def most_sequences(max_batch: int, drafts: int) -> int:
    """In a step with so many drafts behind each token."""
    return min(max_batch, MOST_ROWS // (drafts + 1))


class Drafting:
    """
    Args:
        drafts: behind each token, in a step that has any.
        max_batch: most sequences of a step.
    """

    def __init__(self, drafts: int, max_batch: int) -> None:
        self.drafts = drafts
        self._most_sequences = most_sequences(max_batch, drafts)
        # By sequences in the batch, and whether there were drafts.
        self._seconds: dict[tuple[int, bool], deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._drafted = False  # the steps until now, so many of them
        self._steps = 0

    def pays(self, sequences: Items[Sequence]) -> bool:
        """Whether the next step, of these sequences, should have drafts."""
        if not 0 < len(sequences) <= self._most_sequences:
            return False
        drafted = self._pays(sequences)
        if drafted is self._drafted and self._steps >= RETRY_STEPS:
            drafted = not drafted
        self._steps = self._steps + 1 if drafted is self._drafted else 0
        self._drafted = drafted
        return drafted

    def _pays(self, sequences: Items[Sequence]) -> bool:
        without, with_drafts = (self._seconds[len(sequences), drafted] for drafted in (False, True))
        if not (without and with_drafts):
            return not with_drafts
        tokens = sum(1 + sequence.drafts_kept for sequence in sequences)
        return tokens * min(without) >= len(sequences) * min(with_drafts)

    def took(self, sequences: int, drafted: bool, seconds: float) -> None:
        """A step is over."""
        self._seconds[sequences, drafted].append(seconds)

    @staticmethod
    def kept(sequence: Sequence, drafts: int) -> None:
        """So many drafts of the sequence were right in a step."""
        sequence.drafts_kept += NEWEST * (drafts - sequence.drafts_kept)
