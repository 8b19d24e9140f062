"""Commands that run one part of a cluster, each in its own process."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from cyclopts import Parameter

from common import garbage
from decode_worker.config import DecodeConfig
from prefill_worker.config import PrefillConfig
from router.config import RouterConfig

Flags = Parameter(name="*")


def router(*, config: Annotated[RouterConfig, Flags] = RouterConfig()) -> None:
    with garbage.none_in_imports():
        from router.main import main

    main(config)


def prefill_worker(*, config: Annotated[PrefillConfig, Flags] = PrefillConfig()) -> None:
    with _ctrl_c_ends_it(), garbage.none_in_imports():
        from prefill_worker.main import main

    main(config)


def decode_worker(*, config: Annotated[DecodeConfig, Flags] = DecodeConfig()) -> None:
    with _ctrl_c_ends_it(), garbage.none_in_imports():
        from decode_worker.main import main

    main(config)


@contextmanager
def _ctrl_c_ends_it() -> Iterator[None]:
    """Lets the signal itself end the process: a KeyboardInterrupt can get lost while PyTorch is imported, and then the
    worker would start nevertheless."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, handler)
