"""The benchmark's other way of choosing workers, in a real router."""

from pathlib import Path

from benchmarks.routing import round_robin
from tests.router import models
from tests.router.cluster import cluster, expected
from tests.router.fake_worker import Script


async def test_workers_take_turns(tmp_path: Path) -> None:
    model = models.write(tmp_path, models.byte_level())
    with round_robin():
        async with cluster(model, [Script(), Script()], [Script(), Script()]) as it:
            for _ in range(4):
                assert list((await it.generate()).choices[0].token_ids) == expected(8)
            assert [len(worker.prefills) for worker in it.prefills] == [2, 2]
            assert [len(worker.reserves) for worker in it.decodes] == [2, 2]
