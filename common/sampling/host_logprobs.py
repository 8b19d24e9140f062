"""Log-probabilities on their way from the device to a message."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from common.device.device_io import HostCopy, to_device
from common.sampling.special_sampling import logprobs, wants_logprobs
from common.sequence import SequenceSpec
from twostroke.v1 import worker_pb2 as pb


class HostLogprobs:
    """Launches the computation of log-probabilities for the rows of a batch that want them, of which there is one at
    least; `read` waits for it.

    Args:
        specs: the batch's rows, in order.
        logits: [B, V] from the model, before penalties.
        tokens: [B] int32, the sampled tokens.
    """

    def __init__(self, specs: Sequence[SequenceSpec], logits: Tensor, tokens: Tensor) -> None:
        self._wanted = [(row, spec.sampling.logprobs or 0) for row, spec in enumerate(specs) if wants_logprobs(spec)]
        rows = to_device(np.asarray([row for row, _ in self._wanted], dtype=np.int64), logits.device)
        computed = logprobs(logits, tokens, rows, max(top for _, top in self._wanted))
        self._tokens = HostCopy(computed.tokens)
        self._top_ids = HostCopy(computed.top_ids)
        self._top = HostCopy(computed.top)

    def read(self) -> dict[int, pb.Logprobs]:
        """Log-probabilities by row, of the rows that want any."""
        tokens, ids, top = (copy.get().tolist() for copy in (self._tokens, self._top_ids, self._top))
        return {
            row: pb.Logprobs(logprob=tokens[i], top_ids=ids[i][:count], top_logprobs=top[i][:count])
            for i, (row, count) in enumerate(self._wanted)
        }
