"""What went over the links: how often what was said, and a digest of all of it, which tells two runs apart."""

from collections import Counter
from hashlib import sha256

from common.worker import causes
from twostroke.v1 import worker_pb2 as pb


class Traffic:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._digest = sha256()

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()[:16]

    def to_router(self, message: pb.WorkerMessage) -> None:
        self._add(message)
        self.counts.update(f"attempts {causes.name_of(ended.cause)}" for ended in message.ended)
        self.counts["reservations refused"] += sum(reserved.refused for reserved in message.reserved)
        self.counts["prompts"] += len(message.prefilled)
        self.counts["prompts cached"] += sum(prefilled.cached_tokens > 0 for prefilled in message.prefilled)
        self.counts["prompts in place"] += sum(not prefilled.HasField("kv") for prefilled in message.prefilled)
        self.counts["pools unreadable"] += sum(opened.problem != "" for opened in message.opened)

    def to_worker(self, message: pb.RouterMessage) -> None:
        self._add(message)
        self.counts["claims"] += message.claimed_blocks > 0

    def _add(self, message: pb.WorkerMessage | pb.RouterMessage) -> None:
        self._digest.update(message.SerializeToString(deterministic=True))
