"""Turns the tokens of one choice into what the client gets: text, token ids, log-probabilities, and the finish."""

import time
from collections.abc import Sequence
from typing import TypeAlias

from router.answers.answer_parser import AnswerParser
from router.answers.stop_strings import StopStrings
from router.dispatch.request import Request, State
from router.equal_sets import one_of
from router.metrics import Metrics
from router.prompts.tokenizer import Tokenizer
from router.validate import Job
from router.vocabulary.detokenizer import NO_SIGNS
from twostroke.v1 import inference_pb2 as pb
from twostroke.v1 import worker_pb2

# Tokens in a delta. All other answers wait while it is made: 10 ms, as with log-probabilities a token takes 30 us.
MOST_TOKENS = 256


News: TypeAlias = tuple[str, Sequence[int], pb.Finish | None]
"""What came of an answer: text; tokens, at most `MOST_TOKENS`, which the text may lag behind; and how it ended, if it
did. A plain tuple, since there is one for every token."""


class Answer:
    """What the client sees of a `Request`. The tokens that came since the last call of `take` become one delta, so it
    goes at the client's pace. While it is `behind` there are more than a delta may have.

    Args:
        begins_text: the answer does not continue the prompt's text; see `Tokenizer.detokenizer`.
        parser: takes reasoning and tool calls out of the text; None if the client did not ask for that.
    """

    __slots__ = (
        "_detokenizer",
        "_eos_token_ids",
        "_job",
        "_metrics",
        "_parser",
        "_request",
        "_silent_stops",
        "_stops",
        "_token_bytes",
        "behind",
        "over",
    )

    def __init__(
        self,
        request: Request,
        job: Job,
        tokenizer: Tokenizer,
        eos_token_ids: Sequence[int],
        metrics: Metrics,
        begins_text: bool,
        parser: AnswerParser | None = None,
    ) -> None:
        self._request = request
        self._job = job
        self._eos_token_ids = eos_token_ids
        self._metrics = metrics
        self._token_bytes = tokenizer.token_bytes.table
        self._parser = parser
        self._detokenizer = tokenizer.detokenizer(
            special_tokens=job.special_tokens,
            begins_text=begins_text,
            signs=NO_SIGNS if parser is None else tokenizer.answer_format.signs,
        )
        self._stops = StopStrings(job.stop) if job.stop else None
        self._silent_stops = one_of(job.stop_token_ids - self._spoken_stops(tokenizer.token_bytes.special))
        self.over = False
        self.behind = False

    def take(self) -> News:
        """What came next."""
        request = self._request
        begin, was_behind = request.taken, self.behind
        tokens = request.output[begin : begin + MOST_TOKENS]
        self.behind = begin + len(tokens) < len(request.output)
        stop, finish = None, None
        if self._stops is None:
            request.taken += len(tokens)
            text = self._text(tokens)
        else:
            text, stop = self._text_to_stop(self._stops, tokens)
            tokens = tokens[: request.taken - begin]
        if stop is not None:
            finish = self._finished(pb.FINISH_REASON_STOP, stop=stop)
        elif request.state is State.FINISHED and not self.behind:
            text += self._rest()
            finish = self._finished_by_token()
        if tokens and not was_behind:
            self._measure()
        return text, tokens, finish

    def write(self, news: News, delta: pb.Delta) -> None:
        """Writes what was taken last into an empty delta."""
        text, tokens, finish = news
        if self._parser is None:
            delta.text = text
        else:
            parts = self._parser.feed(text, last=finish is not None)
            delta.text = parts.text
            delta.reasoning_content = parts.reasoning
            delta.tool_calls.extend(parts.calls)
        if self._job.want_token_ids:
            delta.token_ids.extend(tokens)
        if self._job.logprobs is not None:
            pairs = zip(tokens, self._request.take_logprobs(len(tokens)), strict=True)
            delta.logprobs.extend(self._token_logprob(token, logprobs) for token, logprobs in pairs)

    @property
    def takes_words(self) -> bool:
        """Whether a word that comes next, see `Words`, brings its text and nothing else."""
        return self._stops is None and self._parser is None and self._detokenizer.takes_words

    # ------------------------------------------------------------ text

    def _spoken_stops(self, special: frozenset[int]) -> frozenset[int]:
        """The stop tokens whose text is part of the answer that they end. The text of the others is left out."""
        hidden = special.union(self._eos_token_ids)
        return frozenset(
            token
            for token in self._job.stop_token_ids
            if (self._job.special_tokens if token in hidden else self._job.include_stop)
        )

    def _text(self, tokens: Sequence[int]) -> str:
        if tokens and tokens[-1] in self._silent_stops:  # no token comes after it
            tokens = tokens[:-1]
        return self._detokenizer.feed(tokens)

    def _text_to_stop(self, stops: StopStrings, tokens: Sequence[int]) -> tuple[str, str | None]:
        """The text up to a stop string, and the stop string if there is one. Goes token by token: which token completes
        a stop string must not depend on how many came at once."""
        text = ""
        for token in tokens:
            self._request.taken += 1
            certain, stop = stops.feed(self._text((token,)), may_end=self._request.taken >= self._job.min_tokens)
            text += certain
            if stop is not None:
                return text + (stop if self._job.include_stop else ""), stop
        return text, None

    def _rest(self) -> str:
        tail = self._detokenizer.finish()
        if self._stops is None:
            return tail
        return self._stops.finish() + tail

    def _token_logprob(self, token: int, logprobs: worker_pb2.Logprobs) -> pb.TokenLogprob:
        table = self._token_bytes
        return pb.TokenLogprob(
            token_id=token,
            token=table[token],
            logprob=logprobs.logprob,
            alternatives=[
                pb.TokenLogprob.Alternative(token_id=top, token=table[top], logprob=logprob)
                for top, logprob in zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)
            ],
        )

    # ------------------------------------------------------------ the end

    def _finished_by_token(self) -> pb.Finish:
        last = self._request.output[-1]
        if last not in self._job.stop_token_ids:
            return self._finished(pb.FINISH_REASON_LENGTH)
        reason = pb.FINISH_REASON_EOS if last in self._eos_token_ids else pb.FINISH_REASON_STOP
        return self._finished(reason, stop_token_id=last)

    def _finished(
        self, reason: pb.FinishReason.ValueType, stop: str = "", stop_token_id: int | None = None
    ) -> pb.Finish:
        self.over = True
        request = self._request
        total = time.monotonic() - request.arrived_at
        self._metrics.end_to_end.observe(total)
        usage = pb.Usage(
            prompt_tokens=len(request.prompt.token_ids),
            completion_tokens=request.taken,
            prefill_cached_tokens=request.prefill_cached_tokens,
            decode_cached_tokens=request.decode_cached_tokens or 0,
            resumes=request.resumes,
        )
        timing = pb.Timing()
        timing.CopyFrom(request.timing)
        timing.total_ms = 1000 * total
        if request.attempt is not None and request.attempt.decoding_since is not None:  # ended by a stop string
            timing.decode_ms += 1000 * (time.monotonic() - request.attempt.decoding_since)
        for phase, histogram in self._metrics.phases.items():
            if milliseconds := getattr(timing, f"{phase}_ms"):  # 0: there was none, such as a transfer
                histogram.observe(milliseconds / 1000)
        return pb.Finish(reason=reason, stop=stop, stop_token_id=stop_token_id, usage=usage, timing=timing)

    def _measure(self) -> None:
        """Observes one gap, however many tokens came after it: to divide it among them would hide stalls."""
        now, request = time.monotonic(), self._request
        if request.told_at is not None:
            self._metrics.inter_token.observe(now - request.told_at)
        request.told_at = now
