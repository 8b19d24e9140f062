from math import inf, nan
from typing import Any

import pytest

from common.model.model_config import ModelConfig, parse_config
from router import validate
from router.errors import InvalidArgument
from tests.router import models
from twostroke.v1 import inference_pb2 as pb

MODEL: ModelConfig = parse_config(models.CONFIG)


def checked(**fields: Any) -> validate.Job:
    return validate.check(pb.GenerateRequest(**{"text": "x", **fields}), MODEL)


@pytest.mark.parametrize(
    ("fields", "field", "limit"),
    [
        ({"request_id": "é" * 65}, "request_id", "128"),
        ({"request_id": "a\nb"}, "request_id", "printable"),
        ({"cache_salt": "s" * 129}, "cache_salt", "128"),
        ({"n": 0}, "n", "[1, 16]"),
        ({"n": 17}, "n", "[1, 16]"),
        ({"response": pb.ResponseOptions(logprobs=21)}, "response.logprobs", "[0, 20]"),
        ({"sampling": pb.Sampling(temperature=-1)}, "sampling.temperature", "0 (greedy)"),
        ({"sampling": pb.Sampling(temperature=nan)}, "sampling.temperature", "nan"),
        ({"sampling": pb.Sampling(temperature=inf)}, "sampling.temperature", "inf"),
        ({"stopping": pb.Stopping(max_tokens=1_000_000)}, "stopping.max_tokens", "1000000 is not within [1, "),
        ({"sampling": pb.Sampling(top_p=0)}, "sampling.top_p", "0 is not within (0, 1]"),
        ({"sampling": pb.Sampling(top_p=1.01)}, "sampling.top_p", "(0, 1]"),
        ({"sampling": pb.Sampling(top_p=nan)}, "sampling.top_p", "nan is not within (0, 1]"),
        ({"sampling": pb.Sampling(top_p=1.0000001)}, "sampling.top_p", "1.0000001 is not within (0, 1]"),
        ({"sampling": pb.Sampling(min_p=-0.1)}, "sampling.min_p", "-0.1 is not within [0, 1]"),
        ({"sampling": pb.Sampling(temperature=100.00001)}, "sampling.temperature", "100.00001 is not 0 (greedy) or"),
        ({"sampling": pb.Sampling(repetition_penalty=0)}, "sampling.repetition_penalty", "[0.001, 1000]"),
        ({"sampling": pb.Sampling(presence_penalty=2.5)}, "sampling.presence_penalty", "[-2, 2]"),
        ({"sampling": pb.Sampling(frequency_penalty=-inf)}, "sampling.frequency_penalty", "[-2, 2]"),
        ({"sampling": pb.Sampling(logit_bias={600: 1})}, "sampling.logit_bias[600]", "600"),
        ({"sampling": pb.Sampling(logit_bias={5: 101})}, "sampling.logit_bias[5]", "[-100, 100]"),
        ({"sampling": pb.Sampling(logit_bias=dict.fromkeys(range(1025), 1))}, "sampling.logit_bias", "1024"),
        ({"stopping": pb.Stopping(max_tokens=0)}, "stopping.max_tokens", "[1, 4096]"),
        ({"stopping": pb.Stopping(max_tokens=4097)}, "stopping.max_tokens", "[1, 4096]"),
        ({"stopping": pb.Stopping(max_tokens=4, min_tokens=5)}, "stopping.min_tokens", "4"),
        ({"stopping": pb.Stopping(min_tokens=5000)}, "stopping.min_tokens", "4096"),
        ({"stopping": pb.Stopping(stop=["a", ""])}, "stopping.stop[1]", "empty"),
        ({"stopping": pb.Stopping(stop=["é" * 129])}, "stopping.stop[0]", "256"),
        ({"stopping": pb.Stopping(stop=["a"] * 17)}, "stopping.stop", "16"),
        ({"stopping": pb.Stopping(stop_token_ids=[1, 600])}, "stopping.stop_token_ids[1]", "600"),
        ({"stopping": pb.Stopping(stop_token_ids=range(65))}, "stopping.stop_token_ids", "64"),
    ],
)
def test_a_wrong_field_is_named_with_its_limit(fields: dict[str, Any], field: str, limit: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        checked(**fields)
    assert refused.value.message.startswith(f"{field}: ")
    assert limit in refused.value.message


def test_no_input_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="input"):
        validate.check(pb.GenerateRequest(), MODEL)


def test_what_is_not_set_gets_the_documented_default() -> None:
    job = checked()
    assert (job.n, job.max_tokens, job.want_token_ids, job.logprobs) == (1, None, True, None)
    sampling = job.sampling
    assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty) == (1, 1, 1)
    assert not sampling.HasField("logprobs")
    assert job.request_id
    assert job.stop_token_ids == {models.EOS}


def test_a_zero_that_is_set_is_no_default() -> None:
    assert checked(sampling=pb.Sampling(temperature=0)).sampling.temperature == 0
    assert checked(sampling=pb.Sampling(temperature=1e-5)).sampling.temperature == pytest.approx(1e-5)
    assert checked(sampling=pb.Sampling(seed=0)).seed == 0
    assert checked(response=pb.ResponseOptions(logprobs=0)).logprobs == 0
    assert not checked(response=pb.ResponseOptions(token_ids=False)).want_token_ids


def test_seeds_are_drawn_anew() -> None:
    assert checked().seed != checked().seed


def test_ignore_eos_leaves_the_request_its_own_stop_tokens() -> None:
    job = checked(stopping=pb.Stopping(ignore_eos=True, stop_token_ids=[7]))
    assert job.stop_token_ids == {7}


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "pool", "length"),
    [(10, 5, None, 15), (10, None, None, 4096), (10, None, 100, 100), (10, 90, 100, 100), (4095, None, 9999, 4096)],
)
def test_length_is_bounded_by_request_context_and_pool(
    prompt: int, max_tokens: int | None, pool: int | None, length: int
) -> None:
    job = checked(stopping=pb.Stopping(max_tokens=max_tokens))
    assert validate.check_length(prompt, job, MODEL, pool) == length


@pytest.mark.parametrize(
    ("prompt", "stopping", "pool", "field", "limit"),
    [
        (0, {}, None, "input", "no tokens"),
        (4096, {}, None, "input", "4096"),
        (100, {}, 100, "input", "the smallest worker has room for 100"),
        (10, {"max_tokens": 4087}, None, "stopping.max_tokens", "4096"),
        (10, {"max_tokens": 91}, 100, "stopping.max_tokens", "100"),
        (10, {"min_tokens": 91}, 100, "stopping.min_tokens", "100"),
    ],
)
def test_what_does_not_fit_is_refused(
    prompt: int, stopping: dict[str, Any], pool: int | None, field: str, limit: str
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        validate.check_length(prompt, checked(stopping=pb.Stopping(**stopping)), MODEL, pool)
    assert refused.value.message.startswith(f"{field}: ")
    assert limit in refused.value.message


def test_equal_stop_tokens_of_requests_are_one_object() -> None:
    asked = [checked(stopping=pb.Stopping(stop_token_ids=[40 + number // 2])) for number in range(4)]
    assert asked[0].stop_token_ids is asked[1].stop_token_ids
    assert asked[2].stop_token_ids is asked[3].stop_token_ids
    assert [max(job.stop_token_ids) for job in asked] == [40, 40, 41, 41]
