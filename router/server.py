"""Puts a router together: its services, its links to workers, its metrics."""

import asyncio
import os
from collections.abc import Awaitable
from functools import partial

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from common.model.model_config import ModelConfig
from common.network.arrival import ArrivalInterceptor
from common.network.grpc_options import CALLERS
from common.network.health import Health
from common.network.peers import Peers
from common.probe import service_of_process
from common.security.cluster_secret import SecretInterceptor
from common.telemetry import metrics_server, tracing
from router.callers.api_keys import ApiKeys
from router.callers.auth import KeyInterceptor
from router.cluster.registry import Registry
from router.cluster.workers import DECODE, PREFILL, ROLE_NAMES
from router.config import RouterConfig
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.settled import Settled
from router.grammars.guides import Guides
from router.metrics import Metrics
from router.parsing import Parser
from router.prompts.tokenizer import Tokenizer
from router.request_trace import INFERENCE
from router.service import InferenceService, RegistryService
from router.validate import MAX_MESSAGE_BYTES
from router.vocabulary.words import Words
from twostroke.v1 import inference_pb2_grpc, worker_pb2, worker_pb2_grpc

REGISTRY = worker_pb2.DESCRIPTOR.services_by_name["Registry"].full_name

NO_SECRET = "set --cluster-secret-file on the router and its workers: a router with API keys lets no worker in without"
WRONG_SECRET = "the router has a cluster secret, and this call not the same: set --cluster-secret-file on the worker"

# Concurrent calls on one connection. More than these wait in the client.
MAX_STREAMS = 1024

# How long it may take, once running calls have had their time, to tell all of them that the router stops: half a
# millisecond for each. Those whose client doesn't read cannot be told; they are cancelled then.
LAST_WORDS_SECONDS = 2.0

# Calls that wait for the event loop to come to them. gRPC cancels those beyond its own limit of 1,000, without a word;
# from here on the queue is what has a limit, and says so.
MAX_PENDING_CALLS = 1 << 16

OPTIONS = [
    *CALLERS,
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
]


class Router:
    """Serves from `start` to `stop`, on the running event loop.

    Raises:
        StartError: a file of certificates, keys or the secret is missing or wrong, or tracing's packages are missing.
    """

    def __init__(self, config: RouterConfig, model: ModelConfig, tokenizer: Tokenizer, guides: Guides) -> None:
        self._config = config
        self._peers = Peers.of(config)
        self._keys = None if config.api_keys is None else ApiKeys(config.api_keys)
        self._tracing = tracing.start(config.otlp_endpoint, "twostroke-router")
        self.metrics = Metrics()
        self.dispatcher = Dispatcher(config, self.metrics)
        self.registry = Registry(config, model, tokenizer.vocabulary, self.dispatcher, self._peers)
        words = Words(tokenizer.token_bytes, model.eos_token_ids)
        settled = Settled(words, self.metrics.inter_token)
        self.service = InferenceService(
            config, model, tokenizer, guides, self.dispatcher, self.registry, settled, self.metrics, self._tracing
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> int:
        """Returns the port it serves at.

        Raises:
            OSError: the address cannot be listened on.
        """
        self._server = grpc.aio.server(options=OPTIONS, interceptors=self._interceptors())
        inference_pb2_grpc.add_InferenceServicer_to_server(self.service, self._server)
        worker_pb2_grpc.add_RegistryServicer_to_server(RegistryService(self.registry), self._server)
        self._health = Health()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (INFERENCE, REGISTRY, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )
        port = self._peers.listen(self._server, self._config.listen)
        self._watch()
        config = self._config
        metrics_server.serve(self.metrics.registry, config.listen, config.metrics_port, self._peers.certificates)
        for service in (REGISTRY, service_of_process(os.getpid())):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        await self._set_health(self.dispatcher.workers.ready)
        await self._server.start()
        self._spawn(self.registry.run())
        if self._keys is not None:
            self._spawn(self._keys.watch())
        return port

    async def stop(self, grace: float) -> None:
        """Takes no new calls, gives running ones `grace` seconds, closes the links to the workers, sends the last
        spans."""
        self.dispatcher.workers.ready_changed = lambda _ready: None
        await self._health.enter_graceful_shutdown()
        self.service.drain()
        end_requests = asyncio.get_running_loop().call_later(grace, self.dispatcher.stop)
        try:
            await self._end_calls(grace + LAST_WORDS_SECONDS)
        finally:
            end_requests.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._tracing.stop)

    async def _end_calls(self, seconds: float) -> None:
        """Takes no new calls, and gives running ones so long. A call that reaches gRPC (1.83) in the moment in which it
        stops is handed to nobody, and gRPC would wait for its end: it is cancelled once all others have been told."""
        stopping, told = asyncio.create_task(self._server.stop(seconds)), False
        while not (await asyncio.wait([stopping], timeout=LAST_WORDS_SECONDS))[0]:
            if told and not self.service.calls:
                stopping.cancel()
                await asyncio.gather(stopping, return_exceptions=True)
                await self._server.stop(None)
                return
            told = not self.service.calls

    def _interceptors(self) -> list[grpc.aio.ServerInterceptor]:
        secret, keys = self._peers.secret, self._keys
        parser = Parser(INFERENCE, self.metrics)
        interceptors: list[grpc.aio.ServerInterceptor] = [
            ArrivalInterceptor(reflection.SERVICE_NAME, parser.parse, parser.parse_each)
        ]
        if secret is not None or keys is not None:
            # Whoever registers as a worker is sent prompts, so with API keys that must not be open to everyone.
            interceptors.append(SecretInterceptor(REGISTRY, secret, NO_SECRET if secret is None else WRONG_SECRET))
        if keys is not None:
            interceptors.append(KeyInterceptor(INFERENCE, keys, secret, self.metrics))
        return interceptors

    def _watch(self) -> None:
        dispatcher, metrics = self.dispatcher, self.metrics
        dispatcher.workers.ready_changed = lambda ready: self._spawn(self._set_health(ready))
        dispatcher.workers.watch()
        metrics.queued.set_function(lambda: dispatcher.queued)
        metrics.queued_prompt_tokens.set_function(lambda: dispatcher.queued_prompt_tokens)
        metrics.running.set_function(lambda: dispatcher.running)
        for role in (PREFILL, DECODE):
            metrics.workers.labels(ROLE_NAMES[role]).set_function(partial(dispatcher.workers.count, role))
            metrics.workers_paused.labels(ROLE_NAMES[role]).set_function(partial(dispatcher.workers.count_paused, role))

    async def _set_health(self, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", INFERENCE):
            await self._health.set(service, status)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.append(task)
        task.add_done_callback(self._tasks.remove)
