"""What `make demo` shows: the embedded model's answers, without the cluster."""

import runpy
from pathlib import Path

from tokenizers import Tokenizer

from common.model import model_files
from kernels.ops import REFERENCE
from router.prompts import chat_template
from tests.common import hf_models
from tests.paged import PagedSequences
from twostroke.chat import chat_of

DEMO = Path(__file__).parents[2] / "deploy" / "demo.py"


def test_each_question_has_an_answer_of_its_own() -> None:
    """One that says the last again looks like a cache that is stale."""
    embedded = model_files.resolve(model_files.EMBEDDED)
    tokenizer = Tokenizer.from_file(str(embedded / "tokenizer.json"))
    template = chat_template.load(embedded)
    assert template is not None
    model = hf_models.load_ours(embedded)
    talk, answers = [], []
    for question in runpy.run_path(str(DEMO))["QUESTIONS"]:
        talk.append({"role": "user", "content": question})
        prompt = tokenizer.encode(template.render(chat_of(talk), 10_000)).ids
        (answer,) = PagedSequences(model, REFERENCE, [prompt], room=9).generate(8)
        answers.append(tokenizer.decode(answer))
        talk.append({"role": "assistant", "content": answers[-1]})
    assert answers == ["The capital of France is Paris.", "The three famous sights in Paris are the"]
