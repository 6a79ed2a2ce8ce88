"""Made data of every task in the authors' layouts and in the hub's fields, and a model small enough to answer it."""

from __future__ import annotations

import csv
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fullrank.train.data.tokenizer import train_bpe

FOLDERS = {
    "boolq": "boolq",
    "piqa": "piqa",
    "social_i_qa": "social_i_qa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "openbookqa": "openbookqa",
}
"""LLM-Adapters' folders."""

_ARC = (
    "Please choose the correct answer to the question: Which is hot?\n\nAnswer1: ice Answer2: the sun Answer3: rain "
    "Answer4: snow\n\nAnswer format: answer1/answer2/answer3/answer4"
)
_ARC_HUB = {
    "question": "Which is hot?",
    "choices": {"text": ["ice", "the sun", "rain", "snow"], "label": ["A", "B", "C", "D"]},
    "answerKey": "B",
}

LOCAL: dict[str, tuple[str, str]] = {
    "boolq": (
        "Please answer the following question with true or false, question: is the sun hot?\n\n"
        "Answer format: true/false",
        "true",
    ),
    "piqa": (
        "Please choose the correct solution to the question: open a jar\n\nSolution1: turn the lid \n\n"
        "Solution2: turn the jar: Solution\n\nAnswer format: solution1/solution2",
        "solution1",
    ),
    "social_i_qa": (
        "Please choose the correct answer to the question: Kim fell. Kim cried. How would you describe Kim?\n\n"
        "Answer1: sad Answer2: glad Answer3: tall\n\nAnswer format: answer1/answer2/answer3",
        "answer1",
    ),
    "hellaswag": (
        "Please choose the correct ending to complete the given sentence: Roof repair: A man sits on a roof. he\n\n"
        "Ending1: wraps skis. Ending2: rips tiles off. Ending3: holds a cube. Ending4: sleeps.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending2",
    ),
    "winogrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence: The cup fell off the "
        "table because _ was wet.\n\nOption1: the cup Option2: the table Answer format: option1/option2",
        "option2",
    ),
    "arc_easy": (_ARC, "answer2"),
    "arc_challenge": (_ARC, "answer2"),
    "openbookqa": (_ARC, "answer2"),
}
"""Task -> an instruction in LLM-Adapters' layout, and its answer."""

HUB: dict[str, dict[str, Any]] = {
    "boolq": {"passage": "", "question": "is the sun hot", "idx": 0, "label": 1},
    "piqa": {"goal": "open a jar", "sol1": "turn the lid ", "sol2": "turn the jar: Solution", "label": 0},
    "social_i_qa": {
        "context": "Kim fell. Kim cried.",
        "question": "How would you describe Kim?",
        "answerA": "sad",
        "answerB": "glad",
        "answerC": "tall",
        "label": "1",
    },
    "hellaswag": {
        "ind": 0,
        "activity_label": "Roof repair",
        "ctx_a": "A man sits on a roof.",
        "ctx_b": "he",
        "ctx": "A man sits on a roof. he",
        "endings": ["wraps skis.", "rips tiles off.", "holds a cube.", "sleeps."],
        "label": "1",
    },
    "winogrande": {
        "sentence": "The cup fell off the table because _ was wet.",
        "option1": "the cup",
        "option2": "the table",
        "answer": "2",
    },
    "arc_easy": _ARC_HUB,
    "arc_challenge": _ARC_HUB,
    "openbookqa": {**{k: v for k, v in _ARC_HUB.items() if k != "question"}, "question_stem": "Which is hot?"},
}
"""The same examples as the hub's datasets have them, written down from their cards."""


def local_row(task: str) -> dict[str, str]:
    instruction, answer = LOCAL[task]
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def write_commonsense(folder: Path, *, copies: int = 3, tasks: tuple[str, ...] = tuple(FOLDERS)) -> Path:
    """LLM-Adapters' dataset folder."""
    for task in tasks:
        (folder / FOLDERS[task]).mkdir(parents=True, exist_ok=True)
        (folder / FOLDERS[task] / "test.json").write_text(json.dumps([local_row(task)] * copies), encoding="utf-8")
    return folder


def mmlu_rows(subject: str, split: str, count: int) -> list[list[str]]:
    draw = random.Random(f"{subject} {split}")
    rows = []
    for number in range(count):
        options = [f"{word}, {draw.randint(0, 99)}" for word in ("one", "two", 'so "called"', "four")]
        rows.append([f" Which {split} of {subject}\nis number {number}? ", *options, draw.choice("ABCD")])
    return rows


def write_mmlu(path: Path, subjects: tuple[str, ...], *, count: int = 3, as_zip: bool = False) -> Path:
    """Hendrycks' csv files in a folder, or in a zip below a folder `data`."""
    folder = path.with_suffix("") if as_zip else path
    for subject in subjects:
        for split, number in (("dev", 5), ("test", count)):
            (folder / split).mkdir(parents=True, exist_ok=True)
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(mmlu_rows(subject, split, number))
    if as_zip:
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*.csv")):
                archive.write(file, f"data/{file.relative_to(folder)}")
    return path


def make_tokenizer() -> PreTrainedTokenizerFast:
    texts = [LOCAL[task][0] for task in LOCAL] + ["Below is an instruction that describes a task ### Response:"] * 5
    return train_bpe(iter(texts), vocab_size=400)


def make_model(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> LlamaForCausalLM:
    """A LLaMA of random weights, large enough for its answers to differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


def write_model(folder: Path, *, seed: int = 0) -> Path:
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
