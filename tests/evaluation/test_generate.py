"""The protocol of LLM-Adapters and Fira: generate, find the first answer, compare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fullrank.evaluation.config import EvaluateConfig
from fullrank.evaluation.generate import find_answer, generate_answers
from fullrank.evaluation.unit import Evaluated
from fullrank.train.data.prompts import render_prompt
from tests.evaluation.made import LOCAL, local_row, make_model, make_tokenizer


@pytest.mark.parametrize(
    ("task", "output", "expected"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "false, not true", "false"),
        ("boolq", "untrue", "true"),  # a pattern, not a word
        ("boolq", "True", None),
        ("boolq", "yes", None),
        ("piqa", "the correct answer is solution2", "solution2"),
        ("piqa", "solution3", None),
        ("piqa", "Solution1", None),
        ("social_i_qa", "answer3 answer1", "answer3"),
        ("social_i_qa", "the correct answer is 3", None),
        ("hellaswag", "the correct answer is ending4", "ending4"),
        ("hellaswag", "answer4", None),
        ("winogrande", "option1", "option1"),
        ("winogrande", "option", None),
        ("arc_easy", "the correct answer is answer5", "answer5"),
        ("arc_challenge", "answer12", "answer1"),
        ("arc_challenge", "answer6", None),
        ("openbookqa", "the correct answer is answer2\n### Response: answer3", "answer2"),
        ("openbookqa", "", None),
    ],
)
def test_the_first_answer_counts(task: str, output: str, expected: str | None) -> None:
    assert find_answer(output, task) == expected


def test_outputs_are_those_of_beam_search_alone_and_in_batches() -> None:
    """Against transformers' own beam search on one prompt at a time, without padding."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    rows = [local_row(task) for task in ("arc_easy", "boolq", "winogrande")]
    config = EvaluateConfig(answer_tokens=6, num_beams=3)
    outcome = generate_answers(rows, "arc_easy", Evaluated(model, tokenizer, batch_size=2), config=config)
    assert outcome.records is not None
    for row, record in zip(rows, outcome.records, strict=True):
        prompt = tokenizer(render_prompt("commonsense-eval", row["instruction"]), return_tensors="pt")["input_ids"]
        written = model.generate(  # type: ignore[operator]
            prompt, attention_mask=torch.ones_like(prompt), num_beams=3, max_new_tokens=6, do_sample=False
        )
        text = tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)
        assert record["output"] == text.partition("### Response:")[0].strip()
        assert record["instruction"] == row["instruction"]
    assert len({record["output"] for record in outcome.records}) > 1


def test_counts_of_right_wrong_and_unparsed(monkeypatch: pytest.MonkeyPatch) -> None:
    import fullrank.evaluation.generate as module

    written = iter([(["answer2", "answer1 or answer2"], 1), (["none of them"], 0)])
    monkeypatch.setattr(module, "_outputs", lambda *_: next(written))
    tokenizer = make_tokenizer()
    rows = [local_row("arc_easy")] * 3
    evaluated = Evaluated(make_model(tokenizer), tokenizer, batch_size=2)
    outcome = generate_answers(rows, "arc_easy", evaluated, config=EvaluateConfig())
    assert outcome.metrics == {"accuracy": 1 / 3}
    assert outcome.details == {"unparsed": 1, "truncated": 1}
    assert [record["prediction"] for record in outcome.records or []] == ["answer2", "answer1", None]
    assert [record["correct"] for record in outcome.records or []] == [True, False, False]


def test_the_input_field_is_not_put_in_the_prompt(tmp_path: Path) -> None:
    """As in the authors' script, which asks the instruction alone."""
    tokenizer = make_tokenizer()
    evaluated = Evaluated(make_model(tokenizer), tokenizer, batch_size=1)
    config = EvaluateConfig(answer_tokens=4)
    row = local_row("boolq")
    plain = generate_answers([row], "boolq", evaluated, config=config)
    other = generate_answers([{**row, "input": LOCAL["piqa"][0]}], "boolq", evaluated, config=config)
    assert json.dumps(plain.records) == json.dumps(other.records)
