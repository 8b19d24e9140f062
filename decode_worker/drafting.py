"""When decode steps draft: where more tokens a second come of it, which is found by trying both ways."""

from collections import defaultdict, deque
from collections.abc import Sequence as Items

from decode_worker.scheduler import Sequence

# Most rows that go through the model in a step with drafts. With more a step is bound by arithmetic, and drafts cost
# as much as other sequences' tokens would.
MOST_ROWS = 256

# Steps of each kind that are remembered; the shortest counts. With another process on the same GPU some take longer.
REMEMBERED = 8

# Share of the time that may be lost by trying the way that gave fewer tokens, as sequences come to repeat themselves.
TRIAL_COST = 0.01

# Weight of a sequence's last step in how many of its drafts are kept.
NEWEST = 0.25

CLOCK_TICK = 1e-6  # seconds, at least, that a step takes


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
        self._most_sequences = most_sequences(max_batch, drafts)
        # By sequences in the batch, and whether there were drafts.
        self._seconds: dict[tuple[int, bool], deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._steps = 0  # since the worse way was tried

    def pays(self, sequences: Items[Sequence]) -> bool:
        """Whether the next step, of these sequences, should have drafts."""
        count = len(sequences)
        if not 0 < count <= self._most_sequences:
            return False
        without, with_drafts = (self._seconds[count, drafted] for drafted in (False, True))
        if not (without and with_drafts):
            return not with_drafts
        kept = sum(sequence.drafts_kept for sequence in sequences) / count
        gain = (1 + kept) * min(without) / min(with_drafts)  # tokens a second, of those without
        if self._steps * TRIAL_COST > 1 - min(gain, 1 / gain):
            self._steps = 0
            return gain < 1
        self._steps += 1
        return gain >= 1

    def observe(self, sequences: Items[Sequence], seconds: float, kept: Items[int] | None) -> None:
        """A step of these sequences is over. `kept`: how many drafts of each were right; None: there were none."""
        self._seconds[len(sequences), kept is not None].append(max(seconds, CLOCK_TICK))
        if kept is not None:
            for sequence, drafts in zip(sequences, kept, strict=True):
                sequence.drafts_kept += NEWEST * (drafts - sequence.drafts_kept)
