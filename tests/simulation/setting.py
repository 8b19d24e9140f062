"""What a world is like: how many parts it has, how large and how patient they are, and what may go wrong."""

import random
from dataclasses import dataclass

from router.cluster.workers import DECODE, PREFILL, Role
from router.config import RouterConfig

BLOCK = 4  # tokens
MAX_LENGTH = 64  # tokens of a sequence; every pool has room for one
FINGERPRINT = "f"  # of the weights
FOREVER = 10**9


@dataclass(frozen=True, slots=True)
class Setting:
    routers: int
    prefill_workers: int
    decode_workers: int
    pools: tuple[int, ...]  # each has one of these numbers of blocks
    host_memories: tuple[int, ...]  # beside each pool is room for one of these numbers of blocks
    lease_seconds: float
    prefills_in_place: bool  # decode workers may
    drafts: int  # of decode workers, behind each token
    plain: bool  # nobody asks for what steps with drafts cannot give
    failing_reads: float  # their share, and that of pools that can't be opened
    faults: bool  # workers die and drain, streams break
    patient: bool  # routers wait for workers, and resume, for as long as it takes: no request fails

    @property
    def slots(self) -> list[tuple[Role, int]]:
        """The places of workers, each of which is filled again when its worker has gone."""
        roles = ((PREFILL, self.prefill_workers), (DECODE, self.decode_workers))
        return [(role, index) for role, count in roles for index in range(count)]

    def router(self, rng: random.Random) -> RouterConfig:
        return RouterConfig(
            headroom_tokens=rng.choice([0, 1, 4, 8, 256]),
            max_queue=rng.choice([40, 1_000, 1_000]),
            max_resumes=FOREVER if self.patient else rng.choice([0, 1, 3]),
            worker_grace=FOREVER if self.patient else 1.0,
        )


def draw(rng: random.Random) -> Setting:
    in_place, drafts = rng.random() < 0.5, rng.choice([0, 0, 1, 4])
    return Setting(
        routers=rng.choice([1, 1, 2]),
        prefill_workers=rng.choice([0, 1, 1, 2] if in_place else [1, 1, 2]),
        decode_workers=rng.choice([1, 1, 2]),
        pools=rng.choice([(16,), (16, 17), (16, 20, 30), (16, 60), (40,)]),
        host_memories=rng.choice([(0,), (0, 3, 20), (60,)]),
        lease_seconds=rng.choice([0.05, 1.0, 60.0]),
        prefills_in_place=in_place,
        drafts=drafts,
        plain=drafts > 0 and rng.random() < 0.7,
        failing_reads=rng.choice([0.0, 0.0, 0.05, 0.2]),
        faults=rng.random() < 0.7,
        patient=rng.random() < 0.6,
    )
