"""Streams that are settled get what they would get as any other, whatever comes when."""

import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.model.model_config import ModelConfig, load_config
from router import validate
from router.answers import answer
from router.answers.answer import Answer
from router.dispatch import settled
from router.dispatch.decoding import Decoding
from router.dispatch.fan_out import fan_out
from router.dispatch.request import Attempt, Prompt, Request, State
from router.dispatch.settled import Reader, Settled
from router.mailbox import Mailbox
from router.metrics import Metrics
from router.prompts.tokenizer import Tokenizer
from router.turnstile import Turnstile
from router.vocabulary.token_bytes import TokenBytes
from router.vocabulary.words import MOST_BYTES, Words
from tests.router.cluster import request
from twostroke.v1 import inference_pb2 as pb
from twostroke.v1 import worker_pb2

LENGTH = 700  # tokens of an answer at most: more than a stream gets before it has to leave


@dataclass
class Call:
    """A shared call, as `router.many` reads its streams."""

    parts: "Parts"
    reader: Reader
    mailbox: "Mailbox[Any]"
    streams: dict[int, "Stream"] = field(default_factory=dict)
    of: dict[Request, "Stream"] = field(default_factory=dict)

    def read(self, most: int = 256, meanwhile: Callable[[], None] = lambda: None) -> None:
        """`meanwhile` happens between two parts of what there is."""
        items, self.mailbox._posted = self.mailbox._posted, []
        for rows in self.parts.settled.to_take(self.reader, most):
            deltas = self.parts.settled.take(self.reader, rows)
            token_ids = iter(() if deltas is None else deltas.token_ids)
            for number, text, count in zip(*(deltas or ((), (), (), ()))[:3], strict=True):
                self.streams[number].told(text, [next(token_ids) for _ in range(count)])
            assert not list(token_ids)
            meanwhile()
        taken = [stream for item in items if (stream := self.of.get(item)) is not None and stream.take()]
        self.parts.settled.settle(
            self.reader, [settled.Stream(it.request, it.number, it.wants_token_ids) for it in taken]
        )


@dataclass
class Stream:
    call: Call
    number: int
    request: Request
    answer: Answer
    wants_token_ids: bool
    decoding: Decoding
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    deltas: int = 0
    finish: pb.Finish | None = None

    def told(self, text: str, token_ids: list[int]) -> None:
        self.text += text
        self.token_ids += token_ids
        self.deltas += 1

    def take(self) -> bool:
        """Whether it can be settled then."""
        self.request.posted = False
        if self.answer.over:
            return False
        text, tokens, self.finish = self.answer.take()
        assert tokens or self.finish is not None
        if tokens:
            self.told(text, list(tokens) if self.wants_token_ids else [])
        else:
            self.text += text
        return self.finish is None and not self.answer.behind and len(tokens) == 1 and self.answer.takes_words

    @property
    def is_settled(self) -> bool:
        return self.request.attempt is not None and self.request.attempt.id in self.decoding.rows

    def end_attempt(self) -> None:
        assert self.request.attempt is not None
        self.decoding.end(self.request.attempt.id)


class Parts:
    def __init__(self, model: Path) -> None:
        self.config: ModelConfig = load_config(model)
        self.metrics = Metrics()
        self.tokenizer = Tokenizer(model, self.config)
        self.words = Words(self.tokenizer.token_bytes, self.config.eos_token_ids)
        self.settled = Settled(self.words, self.metrics.inter_token)
        self._attempts = iter(range(1 << 40, 1 << 41))
        self._open = ExitStack()

    def call(self) -> Call:
        mailbox: Mailbox[Any] = Mailbox(Turnstile())
        return Call(self, self._open.enter_context(self.settled.reading(lambda: mailbox.post(None))), mailbox)

    def stream(self, call: Call, number: int, decoding: Decoding, wants_token_ids: bool = True) -> Stream:
        job = validate.check(request(max_tokens=LENGTH, stopping={"ignore_eos": number % 2 == 1}), self.config)
        prompt = Prompt((40,), 0, job.stop_token_ids, "")
        made = Request("", 0, number, prompt, job.sampling, call.mailbox, LENGTH + 1)
        answer = Answer(made, job, self.tokenizer, self.config.eos_token_ids, self.metrics, begins_text=True)
        stream = call.streams[number] = call.of[made] = Stream(call, number, made, answer, wants_token_ids, decoding)
        self.attempt(stream, decoding)
        return stream

    def attempt(self, stream: Stream, decoding: Decoding) -> None:
        """A worker decodes it from now on."""
        made, worker = stream.request, SimpleNamespace(decoding=decoding)
        stream.decoding = decoding
        made.attempt = Attempt(next(self._attempts), made, None, worker, 0, 0, True, made.length)  # type: ignore[arg-type]
        made.state = State.DISPATCHED
        decoding.requests[made.attempt.id] = made

    @property
    def of_a_character(self) -> int:
        """A token that is the beginning of one."""
        table, special = self.tokenizer.token_bytes.table, self.tokenizer.token_bytes.special
        return next(token for token in self.words.others - special if table[token] == b"\xe4")

    @property
    def gaps(self) -> float:
        return self.metrics.registry.get_sample_value("twostroke_inter_token_seconds_count") or 0


@pytest.fixture
def parts(model: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    monkeypatch.setattr(settled, "LEAST_BATCH", 1)
    monkeypatch.setattr(settled, "MOST_TOKENS", 256)
    return Parts(model)


def step(decoding: Decoding, tokens: dict[int, int], *later: tuple[int, int]) -> None:
    attempt_ids, token_ids = zip(*tokens.items(), *later, strict=True) if tokens else ((), ())
    fan_out(decoding, worker_pb2.StepTokens(attempt_ids=attempt_ids, token_ids=token_ids))


def attempt_of(stream: Stream) -> int:
    assert stream.request.attempt is not None
    return stream.request.attempt.id


@pytest.mark.parametrize("seed", range(6))
def test_everyone_gets_all_tokens_once_and_in_order(parts: Parts, seed: int) -> None:
    draw = random.Random(seed)
    calls, workers = [parts.call() for _ in range(3)], [Decoding() for _ in range(2)]
    streams = [
        parts.stream(draw.choice(calls), number, draw.choice(workers), wants_token_ids=draw.random() < 0.8)
        for number in range(24)
    ]
    made: dict[int, list[int]] = {stream.number: [] for stream in streams}
    words = [token for token, word in enumerate(parts.words.texts) if word]
    others = [token for token in parts.words.others if token not in parts.config.eos_token_ids]
    parts_of_characters = [token for token in others if parts.tokenizer.token_bytes.table[token]]
    was_settled = 0
    live = list(streams)

    def end(stream: Stream) -> None:
        live.remove(stream)
        stream.end_attempt()
        stream.request.end()

    def step_of(decoding: Decoding) -> None:
        tokens: dict[int, int] = {}
        later = []
        for stream in live:
            if stream.decoding is decoding and draw.random() < 0.95:
                rare = draw.random()
                kind = parts_of_characters if rare < 0.05 else others if rare < 0.06 else words
                token = draw.choice(parts.config.eos_token_ids) if rare > 0.999 else draw.choice(kind)
                tokens[attempt_of(stream)] = token
                made[stream.number].append(token)
                if kind is words and rare < 0.15 and len(made[stream.number]) < LENGTH:
                    later.append((attempt_of(stream), 41))
                    made[stream.number].append(41)
        step(decoding, tokens, *later)
        for stream in [stream for stream in live if stream.request.complete]:
            end(stream)

    for _ in range(2_500):
        step_of(draw.choice(workers))
        was_settled += sum(stream.is_settled for stream in live)
        for call in calls:
            if draw.random() < 0.7:
                call.read(draw.choice([1, 2, 256]), lambda: step_of(workers[0]) if draw.random() < 0.1 else None)
        if draw.random() < 0.03 and live:  # it is resumed on another worker
            stream = draw.choice(live)
            stream.end_attempt()
            assert stream.request.output == made[stream.number], "what is to be computed again"
            parts.attempt(stream, draw.choice(workers))
    for stream in list(live):
        end(stream)
    for call in calls:
        call.read()
    assert was_settled > 10_000
    for stream in streams:
        assert stream.request.output == made[stream.number]
        assert stream.token_ids == (made[stream.number] if stream.wants_token_ids else [])
        kept = made[stream.number]
        if kept[-1] in stream.request.stop_token_ids:
            kept = kept[:-1]
        assert stream.text == parts.tokenizer.decode(kept, special_tokens=False)
        assert stream.finish is not None
        assert stream.finish.usage.completion_tokens == len(made[stream.number])
    assert parts.gaps == sum(stream.deltas - 1 for stream in streams)
    assert not any(worker.rows for worker in workers)
    assert not any(call.reader.settled for call in calls)
    assert len(parts.settled._free) == len(parts.settled._requests) - 1
    assert not any(parts.settled._requests)


def settled_stream(parts: Parts, call: Call, number: int, decoding: Decoding) -> Stream:
    stream = parts.stream(call, number, decoding)
    step(decoding, {attempt_of(stream): 41})
    call.read()
    assert stream.is_settled
    return stream


def test_a_worker_adds_nothing_to_what_another_decodes(parts: Parts) -> None:
    call, decoding, other = parts.call(), Decoding(), Decoding()
    stream, its = (settled_stream(parts, call, number, worker) for number, worker in enumerate((decoding, other)))
    step(other, {attempt_of(stream): 42, attempt_of(its): 43})
    call.read()
    assert (stream.token_ids, its.token_ids) == ([41], [41, 43])


def test_the_worker_of_an_attempt_that_has_ended_adds_nothing(parts: Parts) -> None:
    call, decoding = parts.call(), Decoding()
    stream = settled_stream(parts, call, 0, decoding)
    attempt = attempt_of(stream)
    stream.end_attempt()
    follower = settled_stream(parts, call, 1, decoding)  # in the same row
    step(decoding, {attempt: 42, attempt_of(follower): 43})
    call.read()
    assert (stream.token_ids, follower.token_ids) == ([41], [41, 43])


def test_a_reader_is_woken_once_for_all_that_it_has_not_taken(parts: Parts) -> None:
    call, decoding = parts.call(), Decoding()
    streams = [settled_stream(parts, call, number, decoding) for number in range(3)]
    for stream in streams:
        step(decoding, {attempt_of(stream): 42})
    assert call.mailbox._posted == [None]
    call.read()
    step(decoding, {attempt_of(stream): 43 for stream in streams})
    assert call.mailbox._posted == [None]
    call.read()
    assert [stream.token_ids for stream in streams] == [[41, 42, 43]] * 3


def test_who_does_not_read_has_all_of_it_in_one_delta(parts: Parts) -> None:
    call, decoding = parts.call(), Decoding()
    stream = settled_stream(parts, call, 0, decoding)
    for token in range(42, 52):
        step(decoding, {attempt_of(stream): token})
    assert not stream.is_settled
    assert len(call.mailbox._posted) == 2, "the reader, when its stream was settled, and the stream"
    call.read()
    assert (stream.deltas, stream.token_ids) == (2, list(range(41, 52)))


def test_a_stream_with_several_tokens_in_a_message_has_them_in_one_delta(parts: Parts) -> None:
    call, decoding = parts.call(), Decoding()
    one, other = (settled_stream(parts, call, number, decoding) for number in range(2))
    step(decoding, {attempt_of(one): 42, attempt_of(other): 44}, (attempt_of(one), 43))
    assert (one.is_settled, other.is_settled) == (False, True)
    call.read()
    assert (one.token_ids, other.token_ids) == ([41, 42, 43], [41, 44])
    assert (one.deltas, other.deltas) == (2, 2)


def test_a_stream_whose_attempt_ends_has_its_last_token_told_at_once(parts: Parts) -> None:
    call, decoding = parts.call(), Decoding()
    stream = settled_stream(parts, call, 0, decoding)
    step(decoding, {attempt_of(stream): 42})
    stream.end_attempt()  # and waits in the queue, to be resumed
    call.read()
    assert stream.token_ids == [41, 42]


def test_what_comes_after_the_last_token_is_ignored(parts: Parts) -> None:
    call, decoding = parts.call(), Decoding()
    stream = settled_stream(parts, call, 0, decoding)
    (end, *_) = parts.config.eos_token_ids
    for token in (end, 42):
        step(decoding, {attempt_of(stream): token})
        call.read()
    assert stream.token_ids == [41, end]


def test_gaps_are_those_between_deltas(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    for module in (answer, settled):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    call, decoding = parts.call(), Decoding()
    stream = settled_stream(parts, call, 0, decoding)
    tokens = (42, 43, parts.of_a_character, 44)  # the third takes it out of the columns
    for gap, token in zip((0.5, 1.0, 2.0, 4.0), tokens, strict=True):
        now += gap
        step(decoding, {attempt_of(stream): token})
        call.read()
    assert parts.gaps == 4
    assert parts.metrics.registry.get_sample_value("twostroke_inter_token_seconds_sum") == 7.5


def test_a_stream_leaves_to_end_where_its_length_says(parts: Parts) -> None:
    call, decoding = parts.call(), Decoding()
    stream = parts.stream(call, 0, decoding)
    stream.request.limit(1 + 3)
    for token in range(41, 47):
        step(decoding, {attempt_of(stream): token})
        call.read()
    assert stream.request.complete
    assert stream.token_ids == [41, 42, 43]


def test_streams_of_small_batches_are_left_alone(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settled, "LEAST_BATCH", 3)
    call, decoding = parts.call(), Decoding()
    streams = [parts.stream(call, number, decoding) for number in range(2)]
    # Neither with those of other calls, nor of other workers.
    others = [parts.stream(parts.call(), 2, decoding), parts.stream(call, 3, Decoding())]

    def go_on(streams: list[Stream]) -> None:
        for stream in streams:
            step(stream.decoding, {attempt_of(stream): 41})
        for stream in streams:
            stream.call.read()

    for _ in range(3):
        go_on([*streams, *others])
    assert not decoding.rows
    streams.append(parts.stream(call, 4, decoding))
    go_on([*streams, *others])
    assert decoding.rows.keys() == {attempt_of(stream) for stream in streams}
    step(decoding, {attempt_of(streams[0]): parts.of_a_character})  # one that leaves comes back alone
    call.read()
    assert not streams[0].is_settled
    go_on(streams)
    assert all(stream.is_settled for stream in streams)


def test_a_stream_is_not_settled_before_its_worker_decodes(parts: Parts) -> None:
    """The first token comes from another, before the decode worker may start."""
    call, decoding = parts.call(), Decoding()
    stream = parts.stream(call, 0, decoding)
    attempt = attempt_of(stream)
    del decoding.requests[attempt]
    stream.request.add(41)
    call.read()
    early = stream.is_settled
    decoding.requests[attempt] = stream.request
    step(decoding, {attempt: 42})
    call.read()
    assert (early, stream.is_settled) == (False, True)
    assert stream.token_ids == [41, 42]


def test_a_stream_is_not_settled_with_a_token_that_came_since_it_was_taken(parts: Parts) -> None:
    call, decoding = parts.call(), Decoding()
    stream = parts.stream(call, 0, decoding)
    step(decoding, {attempt_of(stream): 41})
    assert stream.take()
    step(decoding, {attempt_of(stream): 42})  # while a message was sent
    assert parts.settled.settle(call.reader, [settled.Stream(stream.request, 0, True)]) == 0
    stream.take()
    assert stream.token_ids == [41, 42]


def test_streams_that_came_together_do_not_leave_together(parts: Parts) -> None:
    call, decoding = parts.call(), Decoding()
    streams = [parts.stream(call, number, decoding) for number in range(64)]
    left = []
    for _ in range(300):
        step(decoding, {attempt_of(stream): 41 for stream in streams})
        left.append(sum(not stream.is_settled for stream in streams))
        call.read()
    assert sum(left[1:]) >= 64
    assert max(left[1:]) == 1


def test_a_reader_that_goes_leaves_its_streams_as_they_were(parts: Parts) -> None:
    decoding, other = Decoding(), parts.call()
    mailbox: Mailbox[Any] = Mailbox(Turnstile())
    with parts.settled.reading(lambda: mailbox.post(None)) as reader:
        call = Call(parts, reader, mailbox)
        stream, its = settled_stream(parts, call, 0, decoding), settled_stream(parts, other, 1, decoding)
    assert (stream.is_settled, its.is_settled) == (False, True)
    step(decoding, {attempt_of(stream): 42, attempt_of(its): 43})
    other.read()
    assert (stream.request.output, its.token_ids) == ([41, 42], [41, 43])


def test_a_long_text_is_no_word() -> None:
    texts = (b"a" * MOST_BYTES, b"a" * (MOST_BYTES + 1), b"\xff", b"", b"end", b"special")
    words = Words(TokenBytes(texts, frozenset({5}), strip_leading_space=False), ends=[4])
    assert words.texts == ["a" * MOST_BYTES, "", "", "", "", ""]
    assert words.words.tolist() == [True] + 5 * [False]
    assert words.others == {1, 2, 3, 4, 5}


def test_what_ends_an_answer_is_no_word(parts: Parts) -> None:
    known, ends = parts.tokenizer.token_bytes, parts.config.eos_token_ids
    assert parts.words.others.issuperset({*known.special, *ends})
    for token, word in enumerate(parts.words.texts):
        assert (token in parts.words.others) == (not parts.words.words[token]) == (not word)
        if word:
            assert word.encode() == known.table[token]
            assert len(word.encode()) <= MOST_BYTES
    call = parts.call()
    stream = parts.stream(call, 0, Decoding())
    assert parts.settled.may_settle(stream.request)
    stream.request.stop_token_ids = frozenset({*ends, 41})  # which is a word
    assert not parts.settled.may_settle(stream.request)
