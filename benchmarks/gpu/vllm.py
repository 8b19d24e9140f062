"""vLLM on the same workloads, where it is installed: in process, for token ids, without its HTTP server.

So it is spared what a service has to do beside: this is the most that its callers could have of it. Weights are random,
as in the other measurements.
"""

import asyncio
import importlib
import importlib.metadata
import importlib.util
import itertools
import multiprocessing
import os
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.load.config import LoadConfig
from benchmarks.load.processes import Ask
from benchmarks.load.record import Record
from benchmarks.load.run import run
from twostroke import DeadlineExceeded, Finish, Piece
from twostroke.v1 import inference_pb2 as pb

WARM_UP = 16  # of so many requests one is run before


@dataclass(frozen=True, slots=True)
class Setup:
    model: Path
    max_length: int
    max_batch: int
    max_batch_tokens: int | None = None  # None: as many as vLLM takes for this GPU

    def arguments(self) -> dict[str, Any]:
        given = {} if self.max_batch_tokens is None else {"max_num_batched_tokens": self.max_batch_tokens}
        return {
            "model": str(self.model),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "max_model_len": self.max_length,
            "max_num_seqs": self.max_batch,
            **given,
        }


def installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


def version() -> str:
    return importlib.metadata.version("vllm")


def seconds_of(
    setup: Setup, workload: Sequence[tuple[Sequence[int], int]], temperature: float, runs: int = 2
) -> list[float]:
    """How long each run takes. To be called in a process of its own, which keeps the GPU's memory until it ends.

    Args:
        workload: token ids of each prompt, all below the vocabulary's size less `runs`, and tokens to generate.
    """
    vllm = importlib.import_module("vllm")
    engine = vllm.LLM(**setup.arguments())
    seconds = []
    for turn in range(runs + 1):
        some = workload[:: WARM_UP if turn == 0 else 1]
        # Other tokens in each run, so that no prefix is in its cache.
        prompts = [{"prompt_token_ids": [token + turn for token in prompt]} for prompt, _ in some]
        settings = [_sampling(vllm, tokens, temperature) for _, tokens in some]
        began = time.perf_counter()
        outputs = engine.generate(prompts, settings, use_tqdm=False)
        if turn > 0:
            seconds.append(time.perf_counter() - began)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [tokens for _, tokens in some]
    return seconds


@contextmanager
def engines(setup: Setup, gpus: Sequence[int]) -> Iterator[Ask]:
    """An engine on each of these GPUs, in a process of its own. They share a load's clients evenly."""
    with ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        pools = [stack.enter_context(ProcessPoolExecutor(1, spawn)) for _ in gpus]
        for started in [pool.submit(_start, setup, gpu) for pool, gpu in zip(pools, gpus, strict=True)]:
            started.result()
        stack.callback(lambda: [pool.submit(_stop).result() for pool in pools])

        def ask(configs: Sequence[LoadConfig], timeout: float) -> list[Future[list[Record]]]:
            shares = (configs[first :: len(pools)] for first in range(len(pools)))
            return [pool.submit(_load, share, timeout) for pool, share in zip(pools, shares, strict=True)]

        yield ask


# ------------------------------------------------------------ in an engine's process


@dataclass(frozen=True, slots=True)
class _Process:
    runner: asyncio.Runner
    engine: Any
    model: pb.GetModelResponse


_processes: list[_Process] = []  # one, from _start to _stop


def _start(setup: Setup, gpu: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    arguments = importlib.import_module("vllm.engine.arg_utils").AsyncEngineArgs(**setup.arguments())
    context = importlib.import_module("vllm.usage.usage_lib").UsageContext.OPENAI_API_SERVER
    config = arguments.create_engine_config(context)
    model = pb.GetModelResponse(
        vocab_size=config.model_config.get_vocab_size(),
        context_length=setup.max_length,
        limits=pb.Limits(max_total_tokens=setup.max_length),
    )

    async def engine() -> Any:
        return importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM.from_engine_args(arguments, True, context)

    runner = asyncio.Runner()
    _processes.append(_Process(runner, runner.run(engine()), model))


def _stop() -> None:
    process = _processes.pop()
    process.engine.shutdown()
    process.runner.close()


def _load(configs: Sequence[LoadConfig], timeout: float) -> list[Record]:
    (process,) = _processes

    async def load() -> list[Record]:
        clients = (_Client(process, timeout) for _ in configs)
        loads = (run(client, config, lambda _: None) for client, config in zip(clients, configs, strict=True))
        return [record for records in await asyncio.gather(*loads) for record in records]

    return process.runner.run(load())


class _Client:
    """An engine, asked as a router is."""

    _ids = itertools.count()

    def __init__(self, process: _Process, timeout: float) -> None:
        self._process = process
        self._timeout = timeout
        self._vllm = importlib.import_module("vllm")

    async def model(self) -> pb.GetModelResponse:
        return self._process.model

    async def stream(
        self, prompt: Sequence[int], *, max_tokens: int, ignore_eos: bool, temperature: float
    ) -> AsyncGenerator[Piece, None]:
        assert ignore_eos
        settings = _sampling(self._vllm, max_tokens, temperature)
        settings.output_kind = importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA
        given = {"prompt_token_ids": list(prompt)}
        try:
            async with asyncio.timeout(self._timeout):
                async for output in self._process.engine.generate(given, settings, str(next(self._ids))):
                    tokens = tuple(output.outputs[0].token_ids)
                    usage = pb.Usage(prefill_cached_tokens=output.num_cached_tokens or 0)
                    finish = Finish("length", "", None, usage, pb.Timing()) if output.finished else None
                    yield Piece("", "", (), tokens, (), 0, None, finish)
        except TimeoutError as error:
            raise DeadlineExceeded(f"not answered within {self._timeout} s") from error


def _sampling(vllm: Any, tokens: int, temperature: float) -> Any:
    return vllm.SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=tokens, detokenize=False)
