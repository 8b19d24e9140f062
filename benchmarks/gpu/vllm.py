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
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.workload import Ask, timed_runs
from benchmarks.load.config import LoadConfig
from benchmarks.load.processes import StartLoads
from benchmarks.load.record import Record
from benchmarks.load.run import run
from twostroke import DeadlineExceeded, Finish, Piece
from twostroke.v1 import inference_pb2 as pb


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


def seconds_of(setup: Setup, asks: Sequence[Ask], temperature: float) -> list[float]:
    """How long each run takes. To be called in a process of its own, which keeps the GPU's memory until it ends."""
    engine = importlib.import_module("vllm").LLM(**setup.arguments())

    def generate(prompts: list[list[int]], settings: list[Any]) -> list[int]:
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    return timed_runs(generate, partial(_sampling, temperature, "FINAL_ONLY"), asks)


@contextmanager
def engines(setup: Setup, gpus: Sequence[int]) -> Iterator[StartLoads]:
    """An engine on each of these GPUs, in a process of its own. They share a load's clients evenly."""
    with ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        pools = [stack.enter_context(ProcessPoolExecutor(1, spawn)) for _ in gpus]
        for started in [pool.submit(_start, setup, gpu) for pool, gpu in zip(pools, gpus, strict=True)]:
            started.result()
        stack.callback(lambda: [pool.submit(_stop).result() for pool in pools])

        def start(configs: Sequence[LoadConfig], timeout: float) -> list[Future[list[Record]]]:
            shares = (configs[first :: len(pools)] for first in range(len(pools)))
            return [pool.submit(_load, share, timeout) for pool, share in zip(pools, shares, strict=True)]

        yield start


# ------------------------------------------------------------ in an engine's process


@dataclass(frozen=True, slots=True)
class _Process:
    runner: asyncio.Runner
    engine: Any


_processes: list[_Process] = []  # one, from _start to _stop


def _start(setup: Setup, gpu: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    arguments = importlib.import_module("vllm.engine.arg_utils").AsyncEngineArgs(**setup.arguments())
    context = importlib.import_module("vllm.usage.usage_lib").UsageContext.OPENAI_API_SERVER

    async def engine() -> Any:
        return importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM.from_engine_args(arguments, True, context)

    runner = asyncio.Runner()
    _processes.append(_Process(runner, runner.run(engine())))


def _stop() -> None:
    process = _processes.pop()
    process.engine.shutdown()
    process.runner.close()


def _load(configs: Sequence[LoadConfig], timeout: float) -> list[Record]:
    (process,) = _processes

    async def load() -> list[Record]:
        client = _Client(process.engine, timeout)
        loads = (run(client, config, lambda _: None) for config in configs)
        return [record for records in await asyncio.gather(*loads) for record in records]

    return process.runner.run(load())


class _Client:
    """An engine, asked as a router is."""

    _ids = itertools.count()

    def __init__(self, engine: Any, timeout: float) -> None:
        self._engine = engine
        self._timeout = timeout

    async def model(self) -> pb.GetModelResponse:
        config = self._engine.model_config
        return pb.GetModelResponse(vocab_size=config.get_vocab_size(), context_length=config.max_model_len)

    async def stream(
        self, prompt: Sequence[int], *, max_tokens: int, ignore_eos: bool, temperature: float
    ) -> AsyncGenerator[Piece, None]:
        assert ignore_eos
        settings = _sampling(temperature, "DELTA", max_tokens)
        given = {"prompt_token_ids": list(prompt)}
        try:
            async with asyncio.timeout(self._timeout):
                async for output in self._engine.generate(given, settings, str(next(self._ids))):
                    tokens = tuple(output.outputs[0].token_ids)
                    usage = pb.Usage(prefill_cached_tokens=output.num_cached_tokens or 0)
                    finish = Finish("length", "", None, usage, pb.Timing()) if output.finished else None
                    yield Piece("", "", (), tokens, (), 0, None, finish)
        except TimeoutError as error:
            raise DeadlineExceeded(f"not answered within {self._timeout} s") from error


def _sampling(temperature: float, output_kind: str, tokens: int) -> Any:
    parameters = importlib.import_module("vllm.sampling_params")
    return parameters.SamplingParams(
        temperature=temperature,
        ignore_eos=True,
        max_tokens=tokens,
        detokenize=False,
        output_kind=parameters.RequestOutputKind[output_kind],
    )
