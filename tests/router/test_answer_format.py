"""The form of a model's answers is found in its template and its vocabulary."""

import pytest

from router.vocabulary import answer_format
from router.vocabulary.answer_format import Calls
from tests.router import models
from tests.router.templates import LLAMA, MISTRAL, MISTRAL_WITH_ARGS, QWEN, R1


@pytest.mark.parametrize(
    ("template", "vocabulary", "calls", "reasoning"),
    [
        (QWEN, [], Calls.TAGGED, True),
        (MISTRAL, ["[TOOL_CALLS]"], Calls.LISTED, False),
        (MISTRAL_WITH_ARGS, [], Calls.NAMED, False),
        (MISTRAL, ["[TOOL_CALLS]", "[ARGS]"], Calls.LISTED, False),
        ("", ["[TOOL_CALLS]", "[ARGS]"], Calls.NAMED, False),
        (LLAMA, ["<|python_tag|>"], Calls.BARE, False),
        (LLAMA, [], None, False),
        (R1, ["<|python_tag|>"], Calls.BARE, True),
        (QWEN, ["<|python_tag|>", "[TOOL_CALLS]"], Calls.TAGGED, True),  # a Hermes, made of a Llama
        (models.CHAT_TEMPLATE, ["<think>", "</think>", "<tool_call>"], Calls.TAGGED, True),
        (models.CHAT_TEMPLATE, [], None, False),
        ("", [], None, False),
    ],
)
def test_what_a_model_writes(template: str, vocabulary: list[str], calls: Calls | None, reasoning: bool) -> None:
    tokens = {token: place for place, token in enumerate(vocabulary)}
    form = answer_format.of(template, tokens.get, frozenset())
    assert (form.calls, form.reasoning, form.signs) == (calls, reasoning, {})


def test_special_tokens_alone_have_signs() -> None:
    tokens = {"<think>": 3, "</think>": 4, "[TOOL_CALLS]": 5, "[ARGS]": 6, "<|im_end|>": 7}
    form = answer_format.of("", tokens.get, frozenset({4, 5, 6, 7}))
    assert form.signs.keys() == {4, 5, 6}
    assert form.seen("<think>") == "<think>"
    assert {form.seen(mark) for mark in ("</think>", "[TOOL_CALLS]", "[ARGS]")} == set(form.signs.values())
    with pytest.raises(UnicodeEncodeError):  # so no text that a token spells is one
        form.seen("[ARGS]").encode()


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [("<think>", True), ("x<think>\n\n", True), ("<think>\n\n</think>\n\n", False), ("<think>x", False), ("", False)],
)
def test_a_prompt_that_opens_the_reasoning(prompt: str, opens: bool) -> None:
    ids: dict[str, int] = {}
    assert answer_format.of(R1, ids.get, frozenset()).opens_reasoning(prompt) == opens
    assert not answer_format.of(LLAMA, ids.get, frozenset()).opens_reasoning(prompt)
