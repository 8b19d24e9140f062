"""Tests in a process of its own whether grammars can be compiled.

Some would take the library hours or gigabytes, and some overflow its stack, which ends the process. There that does no
harm. Workers, which compile the grammars that passed, give the library more stack.
"""

import multiprocessing
import os
import resource
import signal
import threading
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from common.model.model_config import ModelConfig
from common.sampling import grammar
from common.sampling.grammar import GrammarError, compile_grammar, load_tokenizer

# CPU time for one grammar. Most take a millisecond.
SECONDS = 2.0

STACK_BYTES = grammar.STACK_BYTES // 2

# Memory for one grammar. Schemas of 256 KiB have taken 50 MB.
MOST_BYTES = 256 << 20

# Held to start or join a process. On two threads at once either could reap the other's child, whose exit code is then
# lost.
_lock = threading.Lock()


# Exit codes of signals that somebody else sends: whoever stops the process group, or a kernel that is short of memory.
# A grammar is blamed for these only the second time.
_FROM_ELSEWHERE = (-signal.SIGTERM, -signal.SIGKILL, -signal.SIGHUP)


class _KilledError(GrammarError):
    """Somebody killed the process while it worked on the grammar."""


class NoGuidesError(GrammarError):
    """This model supports no grammars."""


class GrammarCheck:
    """Not thread-safe. The process is started by the first call, and ends when this object is freed.

    Args:
        directory: of the model.
        model: its configuration.
    """

    def __init__(self, directory: Path, model: ModelConfig) -> None:
        self._directory = directory
        self._model = model
        self._process: BaseProcess | None = None

    def __call__(self, text: str) -> None:
        """
        Raises:
            GrammarError: the grammar can't be compiled.
            RuntimeError: the process can't be started, whatever the grammar.
        """
        if self._process is not None and _has_ended(self._process):
            self._end()  # it was killed while it was idle, which is no grammar's fault
        try:
            self._ask(text)
        except _KilledError:
            self._ask(text)

    def _ask(self, text: str) -> None:
        if self._process is None:
            self._begin()
        try:
            self._pipe.send(text)
            problem = self._pipe.recv()
        except (EOFError, OSError):
            raise _what_ended_it(self._end()) from None
        if problem:
            raise GrammarError(problem)

    def _begin(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        process = spawn.Process(
            target=_serve,
            args=(theirs, self._directory, self._model, SECONDS, MOST_BYTES),
            name="grammar check",
            daemon=True,
        )
        with _lock:
            process.start()
        theirs.close()
        self._process = process
        try:
            problem = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the process that checks grammars ended at its start, with {self._end()}") from error
        if problem:
            self._end()
            raise NoGuidesError(problem)

    def _end(self) -> int | None:
        """Closes the pipe, which makes the process exit, and waits for that. Returns the exit code."""
        process, self._process = self._process, None
        self._pipe.close()
        assert process is not None
        with _lock:
            process.join()
            return process.exitcode


def _has_ended(process: BaseProcess) -> bool:
    with _lock:
        return not process.is_alive()


def _what_ended_it(exit_code: int | None) -> GrammarError:
    """Says what is wrong with the grammar that ended the process."""
    if exit_code == -signal.SIGPROF:
        return GrammarError(f"it takes more than {SECONDS:g} seconds to compile")
    kind = _KilledError if exit_code in _FROM_ELSEWHERE else GrammarError
    return kind("it is too deeply nested, or too large, to be compiled")


def _serve(pipe: Connection, directory: Path, model: ModelConfig, seconds: float, most_bytes: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the router, which then closes the pipe
    os.nice(10)  # the router and the workers come first
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # grammars that crash it must not fill the disk with core dumps
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_answer, args=(pipe, directory, model, seconds, most_bytes))
    thread.start()
    thread.join()


def _answer(pipe: Connection, directory: Path, model: ModelConfig, seconds: float, most_bytes: int) -> None:
    """Sends what is wrong with the model, and then, for each grammar that it receives, what is wrong with that; an
    empty text if nothing is."""
    try:
        tokenizer = load_tokenizer(directory, model)
    except GrammarError as error:
        pipe.send(str(error))
        return
    _limit_memory(most_bytes)
    pipe.send("")
    while True:
        try:
            text = pipe.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)  # then SIGPROF ends the process
        try:
            compile_grammar(tokenizer, text)
            problem = ""
        except GrammarError as error:
            problem = str(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send(problem)


def _limit_memory(more: int) -> None:
    """Limits this process to the memory that it has now and `more` bytes. An allocation beyond that ends it."""
    own = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()  # what RLIMIT_DATA counts
    resource.setrlimit(resource.RLIMIT_DATA, (own + more, own + more))
