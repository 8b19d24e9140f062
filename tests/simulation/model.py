"""The model of all workers. What they compile of grammars is each worker's own."""

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from benchmarks.parts import LoadedModel
from common.sampling.grammar import CompiledGrammars, GrammarTokenizer, load_tokenizer
from common.sampling.guided_sampling import GuidedSampling
from tests.one_worker import load_tiny
from tests.router.models import VOCAB_SIZE
from tests.simulation.tasks import Tasks


@dataclass(frozen=True, slots=True)
class Model:
    _loaded: LoadedModel
    _tokenizer: GrammarTokenizer

    def with_grammars(self, tasks: Tasks) -> LoadedModel:
        """For one worker. Its grammars are compiled as `tasks`."""
        return replace(self._loaded, guided=GuidedSampling(_Grammars(self._tokenizer, tasks), VOCAB_SIZE, threads=1))


def load(directory: Path) -> Model:
    """A tiny one with random weights, written to the directory."""
    loaded = load_tiny(directory)
    return Model(loaded, load_tokenizer(directory, loaded.model.config))


class _Grammars(CompiledGrammars):
    def __init__(self, tokenizer: GrammarTokenizer, tasks: Tasks) -> None:
        self.tokenizer = tokenizer
        self._kept = OrderedDict()
        self._threads = cast(ThreadPoolExecutor, cast(Any, tasks))
