"""Starts a router, and stops it on a signal."""

import asyncio
import signal
from pathlib import Path

import structlog

from common import garbage
from common.model.model_config import load_config
from common.model.model_files import resolve
from common.network import open_files
from common.network.addresses import with_port
from common.network.peers import only_local
from common.signals import ending_signals, ignore_hangups
from common.telemetry import logs
from router.config import RouterConfig
from router.grammars.guides import Guides
from router.prompts.tokenizer import Tokenizer
from router.server import Router
from twostroke import event_loop

log = structlog.get_logger(__name__)


def main(config: RouterConfig) -> None:
    """Serves until SIGTERM, SIGHUP or Ctrl-C; a second SIGTERM or Ctrl-C does not wait for running requests."""
    logs.configure(config.log_format)
    open_files.allow_all()
    directory = resolve(config.model, weights=False)  # not on the event loop, which would hold Ctrl-C back
    event_loop.run(_serve(config, directory))


async def _serve(config: RouterConfig, directory: Path) -> None:
    model = load_config(directory, to_run=False)
    router = Router(config, model, Tokenizer(directory, model), Guides(directory, model))
    port = await router.start()
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGINT, *ending_signals()):
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, number)
    garbage.forget_start()
    log.info("router listening", address=with_port(config.listen, port), model=config.model)
    if not (config.api_keys or config.tls_client_ca or only_local(config.listen)):
        log.warning("whoever reaches this address is served; --api-keys or --tls-client-ca would change that")
    await signals.get()
    ignore_hangups()
    log.info("draining", seconds=config.drain_seconds, running=router.dispatcher.running)
    draining = asyncio.ensure_future(router.stop(config.drain_seconds))
    hurry = asyncio.ensure_future(signals.get())
    await asyncio.wait((draining, hurry), return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        draining.cancel()
        await router.stop(0)
    hurry.cancel()
