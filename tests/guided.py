"""Workers' parts that can follow grammars, the tokens that a grammar allows, and a compiler of grammars that waits."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llguidance import LLMatcher

from benchmarks.parts import LoadedModel, load_model
from common.sampling import grammar
from common.sampling.grammar import GrammarTokenizer
from common.worker.loading import load_guided


def load(directory: Path, dtype: str, device: torch.device, *, dummy: bool, max_length: int) -> LoadedModel:
    loaded = load_model(directory, dtype, device, dummy=dummy, max_length=max_length)
    return replace(loaded, guided=load_guided(directory, loaded.model.config))


def allowed_tokens(tokenizer: GrammarTokenizer, matcher: LLMatcher) -> list[int]:
    bits = matcher.compute_bitmask()
    return [token for token in range(tokenizer.tokens.vocab_size) if bits[token // 8] >> token % 8 & 1]


def hold_up_compiler(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """From now on no grammar is compiled before the event is set."""
    go_on = threading.Event()
    compile_grammar = grammar.compile_grammar

    def held_up(tokenizer: GrammarTokenizer, text: str) -> LLMatcher:
        go_on.wait(10)
        return compile_grammar(tokenizer, text)

    monkeypatch.setattr(grammar, "compile_grammar", held_up)
    return go_on
