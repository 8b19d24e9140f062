"""Commands that run one part of a cluster, each in its own process."""

from typing import Annotated

from cyclopts import Parameter

from decode_worker.config import DecodeConfig
from prefill_worker.config import PrefillConfig
from router.config import RouterConfig

Flags = Parameter(name="*")


def router(*, config: Annotated[RouterConfig, Flags] = RouterConfig()) -> None:
    from router.main import main

    main(config)


def prefill_worker(*, config: Annotated[PrefillConfig, Flags] = PrefillConfig()) -> None:
    from prefill_worker.main import main

    main(config)


def decode_worker(*, config: Annotated[DecodeConfig, Flags] = DecodeConfig()) -> None:
    from decode_worker.main import main

    main(config)
