"""LLM-Adapters' protocol for the commonsense tasks: the model writes an answer, and the first answer in it counts.

The facts are those of Fira's commonsense_evaluate.py (LLM-Adapters' script): the instruction alone is put in the
prompt, the file's `input` is not; beam search with 4 beams and 32 new tokens; what the model wrote up to a second
"### Response:" is searched for the first of the task's answers, which must be the row's own. An output without any
counts as wrong.

Their script also sets temperature 0.1, top_p 0.75 and top_k 40, without do_sample: transformers ignores the three in
beam search and says so, and so they are not set here. Their prompts differ from those of their training: see
`prompt_template`. They run in float16, one prompt at a time; in batches, prompts here are padded on the left.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import logging as progress

from fullrank.errors import ConfigError
from fullrank.evaluation.commonsense import answers
from fullrank.evaluation.config import EvaluateConfig
from fullrank.evaluation.unit import Evaluated, Outcome
from fullrank.train.data.prompts import render_prompt
from fullrank.train.model import longest_sequence

_RESPONSE = "### Response:"


def find_answer(output: str, task: str) -> str | None:
    """The first of a task's answers in what a model wrote; None if there is none."""
    known = answers(task)
    if known[0] == "answer1":
        known = [
            f"answer{number}" for number in range(1, 6)
        ]  # theirs for all tasks of this kind, whatever their options
    found = re.search("|".join(known), output)
    return None if found is None else found[0]


def generate_answers(rows: list[dict[str, Any]], task: str, evaluated: Evaluated, *, config: EvaluateConfig) -> Outcome:
    """Let a model answer every row, and count the right answers.

    Args:
        rows: LLM-Adapters' rows.
        task: Our name of their task.
        evaluated: The model.
        config: Template, beams and length.

    Returns:
        ``accuracy``, the number of outputs without an answer as ``unparsed``, and every output.
    """
    records: list[dict[str, Any]] = []
    num_cut = 0
    starts = range(0, len(rows), evaluated.batch_size)
    for start in progress.tqdm(starts, desc=task, unit="batch", leave=False):
        batch = rows[start : start + evaluated.batch_size]
        outputs, cut = _outputs(batch, evaluated, config)
        num_cut += cut
        for row, output in zip(batch, outputs, strict=True):
            prediction = find_answer(output, task)
            records.append(
                {
                    "instruction": row["instruction"],
                    "output": output,
                    "prediction": prediction,
                    "answer": row["answer"],
                    "correct": prediction == row["answer"],
                }
            )
    return Outcome(
        metrics={"accuracy": sum(record["correct"] for record in records) / len(records)},
        metric="accuracy",
        num_examples=len(records),
        details={"unparsed": sum(record["prediction"] is None for record in records), "truncated": num_cut},
        records=records,
    )


@torch.inference_mode()
def _outputs(rows: list[dict[str, Any]], evaluated: Evaluated, config: EvaluateConfig) -> tuple[list[str], int]:
    """What the model writes after each row's prompt, and how many prompts were too long and lost their beginning."""
    tokenizer = evaluated.tokenizer
    bound = longest_sequence(evaluated.model)
    room = None if bound is None else bound - config.answer_tokens
    if room is not None and room < 1:
        raise ConfigError(
            f"answer_tokens is {config.answer_tokens}, and the model takes {bound} tokens with its prompt. Lower it."
        )
    prompts = [render_prompt(config.prompt_template, row["instruction"], tokenizer=tokenizer) for row in rows]
    # a chat template writes the special tokens itself
    tokens = tokenizer(prompts, add_special_tokens=config.prompt_template != "chat")["input_ids"]
    kept = [prompt if room is None else prompt[-room:] for prompt in tokens]
    inputs = tokenizer.pad({"input_ids": kept}, padding_side="left", return_tensors="pt").to(evaluated.device)
    generate: Any = evaluated.model.generate
    output = generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        generation_config=GenerationConfig(
            num_beams=config.num_beams,
            do_sample=False,
            max_new_tokens=config.answer_tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
    )
    written = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    num_cut = sum(len(short) < len(whole) for short, whole in zip(kept, tokens, strict=True))
    return [text.partition(_RESPONSE)[0].strip() for text in written], num_cut
