"""Checks the grammars of all callers, a few at a time, so that no caller's slow ones hold up the others'."""

import asyncio
from collections import OrderedDict
from contextlib import suppress
from functools import partial
from pathlib import Path

from common.model.model_config import ModelConfig
from common.sampling.grammar import AT_ONCE, KEPT, GrammarError
from router.callers.fair_threads import FairThreads
from router.errors import Exhausted
from router.grammars.grammar_check import GrammarCheck

# Grammars of one caller that wait to be compiled. Most take a millisecond, none takes much more than
# grammar_check.SECONDS.
MAX_WAITING = 16


class GrammarChecks:
    """Remembers the results of the last grammars, so that common ones are compiled once.

    Args:
        directory: of the model.
        model: its configuration.
    """

    def __init__(self, directory: Path, model: ModelConfig) -> None:
        # used from the end, so that few start a process
        self._idle = [GrammarCheck(directory, model) for _ in range(AT_ONCE)]
        self._threads = FairThreads(AT_ONCE, "grammar")
        self._known: OrderedDict[str, GrammarError | None] = OrderedDict()  # by grammar: what is wrong with it
        # By caller and grammar. Callers don't share a check: one would wait for all that the other had asked for
        # before.
        self._begun: dict[tuple[str, str], asyncio.Task[GrammarError | None]] = {}

    async def check(self, grammar: str, caller: str) -> None:
        """
        Raises:
            GrammarError: the grammar can't be compiled.
            Exhausted: too many of the caller's grammars wait.
            RuntimeError: the process that compiles can't be started, whatever the grammar.
        """
        if grammar in self._known:
            self._known.move_to_end(grammar)
            problem = self._known[grammar]
        else:
            problem = await asyncio.shield(self._begun.get((caller, grammar)) or self._begin(caller, grammar))
        if problem is not None:
            # Anew: an error holds the frames that it was raised through, and they the message of the call.
            raise type(problem)(*problem.args)

    def _begin(self, caller: str, grammar: str) -> "asyncio.Task[GrammarError | None]":
        if sum(other == caller for other, _ in self._begun) >= MAX_WAITING:
            raise Exhausted("too many guides wait to be compiled")
        task = self._begun[caller, grammar] = asyncio.create_task(self._check(caller, grammar))
        return task

    async def _check(self, caller: str, grammar: str) -> GrammarError | None:
        try:
            return await self._threads.submit(caller, partial(self._problem, grammar))
        finally:
            del self._begun[caller, grammar]
            if len(self._known) > KEPT:
                self._known.popitem(last=False)

    def _problem(self, grammar: str) -> GrammarError | None:
        """Compiles the grammar, on a thread, when it is the caller's turn. Returns what is wrong with it."""
        with suppress(KeyError):
            return self._known[grammar]  # checked for another caller in the meantime
        # Remembered before the turn ends. The next one may be for the same grammar, and begins before the event loop
        # comes to this one's result.
        problem = self._known[grammar] = self._compile(grammar)
        return problem

    def _compile(self, grammar: str) -> GrammarError | None:
        check = self._idle.pop()
        try:
            check(grammar)
        except GrammarError as error:
            return error
        finally:
            self._idle.append(check)
        return None
