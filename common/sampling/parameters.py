"""How a request wants its tokens drawn."""

from dataclasses import dataclass

from twostroke.v1 import worker_pb2 as pb

# Largest penalty, bias or temperature: more than a router lets through, and too little to make logits infinite.
MOST = 1_000


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Applied in this order: repetition penalty, presence and frequency penalty, logit bias, temperature, top-k, top-p,
    min-p."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # over prompt and output; 1: off
    presence_penalty: float = 0.0  # over the output; 0: off
    frequency_penalty: float = 0.0  # over the output; 0: off
    seed: int = 0  # unsigned, 64 bits
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    logprobs: int | None = None  # number of likeliest alternatives; None: no log-probabilities at all

    def check(self, vocab_size: int) -> None:
        """Raises ValueError if a step could not be computed with this. (The router enforces narrower ranges.)"""
        numbers = (
            self.repetition_penalty,
            self.presence_penalty,
            self.frequency_penalty,
            *dict(self.logit_bias).values(),
        )
        if not all(abs(number) <= MOST for number in numbers) or self.repetition_penalty < 0.5 / MOST:
            raise ValueError("a penalty or bias is out of range")
        greedy = self.temperature == 0
        if not ((greedy or 1e-6 <= self.temperature <= MOST) and 0 < self.top_p <= 1 and 0 <= self.min_p <= 1):
            raise ValueError("temperature, top_p or min_p is out of range")
        if max(self.top_k, self.logprobs or 0, *(token + 1 for token, _ in self.logit_bias)) > vocab_size:
            raise ValueError(f"top_k, logprobs or a biased token exceeds the vocabulary of {vocab_size}")

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def sampling_from_proto(message: pb.SamplingParams) -> SamplingParams:
    """The parameters as they came from a router; `check` tells whether they make sense."""
    return SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        seed=message.seed,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
    )
