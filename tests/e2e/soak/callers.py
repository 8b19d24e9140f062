"""Callers of a soak: each asks one question after the other, in every way there is, and judges what comes back."""

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.e2e.soak.outages import Outages
from tests.e2e.soak.questions import WRONG, Answer, Question
from tests.e2e.soak.shared import SharedStreams
from twostroke import (
    Client,
    DeadlineExceeded,
    Generation,
    InvalidArgument,
    Overloaded,
    Piece,
    TwostrokeError,
    Unavailable,
)

# No request takes so long, whatever was done to the cluster: one that does is lost.
LOST_SECONDS = 60.0

WAYS = {
    "unary": 30,
    "stream": 20,
    "leave": 6,
    "shared": 20,
    "shared leave": 6,
    "shared by threads": 20,
    "shared by threads, leave": 6,
    "deadline": 12,
    "wrong": 6,
}


@dataclass
class Tally:
    """What all callers saw; `problems` says what must not have been."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # by way and outcome
    kinds: Counter[str] = field(default_factory=Counter)  # answered questions
    answered_tokens: int = 0
    resumes: int = 0
    slowest_seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Caller:
    clients: Mapping[str, Client]  # by the router's name among the parts
    shared: Mapping[str, SharedStreams]
    shared_by_threads: Mapping[str, Client]
    references: Mapping[Question, Answer]
    outages: Outages
    tally: Tally
    rng: random.Random

    def run(self, over: threading.Event) -> None:
        questions = list(self.references)
        while not over.is_set():
            way = self.rng.choices(list(WAYS), list(WAYS.values()))[0]
            self._ask(way, self.rng.choice(questions))
            over.wait(self.rng.uniform(0, 0.05))

    def _ask(self, way: str, question: Question) -> None:
        router = self.rng.choice(list(self.clients))
        began = time.monotonic()
        try:
            client = self.shared_by_threads[router] if "threads" in way else self.clients[router]
            outcome, problem = self._outcome(way, client, self.shared[router], question)
        except TwostrokeError as error:
            outcome = error.code.name
            problem = self._judge(way, error, router, began)
        seconds = time.monotonic() - began
        with self.tally.lock:
            self.tally.counts[way, outcome] += 1
            self.tally.slowest_seconds = max(self.tally.slowest_seconds, seconds)
            if outcome == "answered":
                self.tally.kinds[question.kind] += 1
            if problem:
                what = f"{way} of a {question.kind} question at {router}, {question.options}"
                self.tally.problems.append(f"{what}: {problem} ({seconds:.1f} s)")
        if outcome == "UNAVAILABLE":
            time.sleep(0.1)

    def _outcome(self, way: str, client: Client, shared: SharedStreams, question: Question) -> tuple[str, str]:
        """How it ended, and what was wrong with it."""
        options = question.options
        if self.rng.random() < 0.5:  # half of the prompts are computed anew, whatever came before
            options = options | {"cache_salt": str(self.rng.getrandbits(60))}
        match way:
            case "unary":
                return self._compare(question, client.generate(question.prompt, timeout=LOST_SECONDS, **options))
            case "stream" | "shared by threads":
                pieces = list(client.stream(question.prompt, timeout=LOST_SECONDS, **options))
                return self._compare_pieces(question, pieces)
            case "shared":
                return self._compare_pieces(question, shared.pieces(question.prompt, LOST_SECONDS, options))
            case "leave" | "shared by threads, leave":
                stream = client.stream(question.prompt, timeout=LOST_SECONDS, **options)
                pieces = list(itertools.islice(stream, self._few()))
                stream.close()
                return self._compare_beginning(question, pieces)
            case "shared leave":
                pieces = shared.pieces(question.prompt, LOST_SECONDS, options, self._few())
                return self._compare_beginning(question, pieces)
            case "deadline":
                seconds = self.rng.choice((0.001, 0.02, 0.1, 0.5))
                return self._compare(question, client.generate(question.prompt, timeout=seconds, **options))
            case _:
                prompt, wrong = self.rng.choice(WRONG)
                client.generate(prompt, timeout=LOST_SECONDS, **wrong)
                return "answered", f"a wrong request was answered: {len(prompt)} tokens, {wrong}"

    def _judge(self, way: str, error: TwostrokeError, router: str, began: float) -> str:
        match error:
            case Unavailable() if self.outages.explain(router, began, time.monotonic()):
                return ""
            case InvalidArgument() if way == "wrong":
                return ""
            case DeadlineExceeded() if way == "deadline":
                return ""
            case Overloaded() if "queue is full" in error.message:
                return ""
        return f"{error.code.name}: {error.message}"

    # ------------------------------------------------------------ answers

    def _compare(self, question: Question, generation: Generation) -> tuple[str, str]:
        with self.tally.lock:
            self.tally.resumes += sum(choice.finish.usage.resumes for choice in generation.choices)
        return self._compare_answer(question, answer_of(generation))

    def _compare_pieces(self, question: Question, pieces: Sequence[Piece]) -> tuple[str, str]:
        with self.tally.lock:
            self.tally.resumes += sum(piece.finish.usage.resumes for piece in pieces if piece.finish)
        if not all(
            any(piece.finish and piece.index == index for piece in pieces) for index in range(_choices(question))
        ):
            return "cut short", "the stream ended without a finish of each choice"
        return self._compare_answer(question, _answer_of_pieces(pieces, _choices(question)))

    def _compare_answer(self, question: Question, answer: Answer) -> tuple[str, str]:
        with self.tally.lock:
            self.tally.answered_tokens += sum(len(tokens) for _, tokens, _ in answer)
        expected = self.references[question]
        return "answered", "" if answer == expected else f"answered {answer}, and before {expected}"

    def _few(self) -> int:
        return self.rng.choice((1, 2, 4, 10))

    def _compare_beginning(self, question: Question, pieces: Sequence[Piece]) -> tuple[str, str]:
        got = _answer_of_pieces(pieces, _choices(question))
        for (text, tokens, _), (all_text, all_tokens, _) in zip(got, self.references[question], strict=True):
            if not (all_text.startswith(text) and all_tokens[: len(tokens)] == tokens):
                return "left", f"had {tokens} until it left, of {all_tokens}"
        return "left", ""


def answer_of(generation: Generation) -> Answer:
    return tuple((choice.text, choice.token_ids, choice.finish.reason) for choice in generation.choices)


def _answer_of_pieces(pieces: Sequence[Piece], choices: int) -> Answer:
    answer = []
    for index in range(choices):
        own = [piece for piece in pieces if piece.index == index]
        text = "".join(piece.text for piece in own)
        tokens = tuple(token for piece in own for token in piece.token_ids)
        answer.append((text, tokens, next((piece.finish.reason for piece in own if piece.finish), "")))
    return tuple(answer)


def _choices(question: Question) -> int:
    return question.options.get("n", 1)
