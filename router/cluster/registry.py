"""The addresses of workers: named in the settings, found through DNS, or registered by the workers themselves."""

import asyncio
import ipaddress
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version

import structlog

from common.model.model_config import ModelConfig
from common.network.addresses import check_target, is_unix
from common.network.peers import Peers
from common.worker.message_size import FULL_BYTES
from router.cluster.worker import Worker
from router.cluster.worker_faults import check
from router.cluster.worker_link import WorkerLink
from router.cluster.workers import DECODE, PREFILL, ROLE_NAMES, Role
from router.config import RouterConfig
from router.dispatch.dispatcher import Dispatcher
from router.errors import InvalidArgument
from twostroke.v1 import worker_pb2

log = structlog.get_logger(__name__)

# Seconds.
REGISTER_INTERVAL = 2.0
REGISTRATION_LASTS = 15.0  # an address is forgotten if there is no connection and no word of it for so long
DNS_INTERVAL = 5.0
MAX_WORKERS = 1024
MAX_ADDRESS = 300  # characters


class Registry:
    """Keeps a link to every address, and refuses workers that do not fit the router's model or one another."""

    def __init__(
        self, config: RouterConfig, model: ModelConfig, vocabulary: str, dispatcher: Dispatcher, peers: Peers
    ) -> None:
        self._model_name = config.model
        self._vocab_size = model.vocab_size
        self._eos_token_ids = model.eos_token_ids
        self._vocabulary = vocabulary
        self.instance = secrets.token_hex(8)
        self._named: list[tuple[str, Role]] = [(address, PREFILL) for address in config.prefill]
        self._named += [(address, DECODE) for address in config.decode]
        self._dispatcher = dispatcher
        self._peers = peers
        self._silence_seconds = config.worker_silence_seconds
        self._links: dict[tuple[str, Role], WorkerLink] = {}
        self._tasks: dict[tuple[str, Role], asyncio.Task[None]] = {}
        self._heard_of: dict[tuple[str, Role], float] = {}
        self._unresolved: dict[str, str] = {}  # names that can't be looked up, and why

    @property
    def connected(self) -> list[Worker]:
        return [link.worker for link in self._links.values() if link.worker is not None]

    def problems(self) -> Iterator[tuple[str, Role, str]]:
        """Address and role of connected workers that can't be used, or not with every worker, and why."""
        for link in self._links.values():
            if link.refused is not None:
                yield link.address, link.role, f"refused: {link.refused}"
            if link.worker is not None:
                for problem in link.worker.pair_problems:
                    yield link.address, link.role, problem

    async def run(self) -> None:
        """Resolves names and forgets addresses that are gone, until cancelled; then closes all links."""
        try:
            while True:
                began = time.monotonic()
                await self._look_up()
                self._forget_gone(began)
                await asyncio.sleep(DNS_INTERVAL)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def register(self, request: worker_pb2.RegisterRequest) -> worker_pb2.RegisterResponse:
        """A worker announces itself, as it does every few seconds.

        Raises:
            InvalidArgument: the address or role is not valid, or there are too many workers.
        """
        if len(request.address) > MAX_ADDRESS:
            raise InvalidArgument("address", f"must have at most {MAX_ADDRESS} characters")
        try:
            check_target(str, request.address)
        except ValueError as error:
            raise InvalidArgument("address", f"{request.address!r} is none. {error}") from error
        if request.role not in ROLE_NAMES:
            raise InvalidArgument("role", "must be prefill or decode")
        key = (request.address, request.role)
        if key not in self._links and len(self._links) >= MAX_WORKERS:
            raise InvalidArgument("address", f"the router has {MAX_WORKERS} workers already, and takes no more")
        self._keep_link(key).announced(request.instance)
        return worker_pb2.RegisterResponse(interval_ms=int(1000 * REGISTER_INTERVAL))

    # ------------------------------------------------------------ for the links

    def refusal(self, worker: Worker, expected: Role) -> str | None:
        hello = worker.hello
        if hello.version != (own := version("twostroke")):
            log.warning("worker of another version", worker=worker.address, version=hello.version, router=own)
        if hello.role != expected:
            return f"it is a {ROLE_NAMES.get(hello.role)} worker, and was named as a {ROLE_NAMES[expected]} worker"
        if any(other.instance == worker.instance for other in self.connected):
            return "it is connected already, under another address"
        layout = hello.pool.layout
        if not layout.block_size or not hello.max_length:
            return "its hello names no KV layout or length"
        if (size := hello.pool.ByteSize()) > FULL_BYTES:  # decode workers are sent it
            return f"the handle of its pool has {size} bytes; at most {FULL_BYTES} are allowed"
        if hello.max_length > layout.num_blocks * layout.block_size:
            return f"by its hello {hello.max_length} tokens fit {layout.num_blocks} blocks of {layout.block_size}"
        if (reason := self._other_model(hello)) is not None:
            return reason
        return next(filter(None, (_difference(hello, other) for other in self.connected)), None)

    def _other_model(self, hello: worker_pb2.WorkerHello) -> str | None:
        """Says where the worker's model and the router's disagree about tokens, with both values; None if they
        agree."""
        for what, there, here in (
            ("vocab_size", hello.vocab_size, self._vocab_size),
            ("eos_token_ids", [*hello.eos_token_ids], [*self._eos_token_ids]),
            ("vocabulary", hello.vocabulary or self._vocabulary, self._vocabulary),
        ):
            if there != here:
                return (
                    f"the {what} of its model {hello.model!r} is {there!r}, and that of the router's "
                    f"{self._model_name!r} is {here!r}: start both with the same --model"
                )
        return None

    def worker_lost(self, worker: Worker) -> None:
        self._dispatcher.worker_lost(worker)
        for link in self._links.values():
            link.ask_again()

    def received(self, worker: Worker, message: worker_pb2.WorkerMessage) -> None:
        check(message, self._vocab_size)
        self._dispatcher.received(worker, message)

    # ------------------------------------------------------------ addresses

    async def _look_up(self) -> None:
        await asyncio.gather(*(self._look_up_one(name, role) for name, role in self._named))

    async def _look_up_one(self, name: str, role: Role) -> None:
        try:
            addresses = await _addresses(name)
        except (OSError, ValueError) as error:  # UnicodeError, a ValueError: no name can be like that
            if self._unresolved.get(name) != str(error):  # it is looked up again every few seconds
                self._unresolved[name] = str(error)
                log.warning("cannot look up", name=name, reason=str(error))
            return
        self._unresolved.pop(name, None)
        for address in addresses:
            self._keep_link((address, role))

    def _keep_link(self, key: tuple[str, Role]) -> WorkerLink:
        """The link to an address that was heard of just now."""
        self._heard_of[key] = time.monotonic()
        if key not in self._links:
            address, role = key
            self._links[key] = WorkerLink(address, role, self.instance, self._peers, self._silence_seconds, self)
            self._tasks[key] = asyncio.create_task(self._links[key].run(), name=f"link {address}")
        return self._links[key]

    def _forget_gone(self, looked_up: float) -> None:
        """
        Args:
            looked_up: time.monotonic() before the last look-up. That may have taken longer than a registration lasts,
                because of one slow name; then the other names were last heard of at its beginning.
        """
        long_ago = looked_up - REGISTRATION_LASTS
        for key, link in list(self._links.items()):
            if link.worker is None and self._heard_of[key] < long_ago:
                log.info("worker forgotten", worker=link.address)
                self._tasks.pop(key).cancel()
                del self._links[key], self._heard_of[key]


def _difference(hello: worker_pb2.WorkerHello, other: Worker) -> str | None:
    """Says what keeps two workers from working together, with both values; None if nothing does."""
    mine, theirs = hello.pool, other.hello.pool
    for what, here, there in (
        ("dtype", hello.dtype, other.hello.dtype),
        ("transport", mine.transport, theirs.transport),
        ("block_size", mine.layout.block_size, theirs.layout.block_size),
        ("num_layers", mine.layout.num_layers, theirs.layout.num_layers),
        ("num_kv_heads", mine.layout.num_kv_heads, theirs.layout.num_kv_heads),
        ("head_dim", mine.layout.head_dim, theirs.layout.head_dim),
        ("KV dtype", mine.layout.dtype, theirs.layout.dtype),
        # last: it differs, too, if any of the above does
        ("fingerprint", hello.fingerprint, other.hello.fingerprint),
    ):
        if here != there:
            return f"its {what} is {here!r}, and that of {other.address} is {there!r}"
    return None


async def _addresses(name: str) -> list[str]:
    """All addresses that a DNS name has now. Anything else (an IP address, localhost, a Unix socket, another scheme of
    gRPC's) is returned as it is.

    Raises:
        OSError: the name can't be looked up.
        ValueError: no name or port can be like that.
    """
    host, _, port = name.rpartition(":")
    if is_unix(name) or host == "localhost" or "/" in host:
        return [name]
    with suppress(ValueError):
        ipaddress.ip_address(host.strip("[]"))
        return [name]
    found = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    return sorted({f"[{ip}]:{port}" if ":" in str(ip) else f"{ip}:{port}" for ip in (entry[4][0] for entry in found)})
