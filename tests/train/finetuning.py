"""A tiny trained model, examples that it can learn, and the configuration of a fine-tuning run on them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, RobertaConfig, RobertaModel

from tests.evaluation.made import write_model
from tests.train.data.glue_files import word_tokenizer, write_official
from tests.train.tiny import METHOD_OPTIONS

TARGETS = ["query", "key", "value", "intermediate.dense", "output.dense"]
ON_FACTORS = {"lr": 0.01, "rank": 2, "lora_rank": 4, "lora_alpha": 8.0, "update_proj_gap": 7}


def write_base(folder: Path) -> Path:
    """A small LLaMA with its tokenizer."""
    return write_model(folder)


def write_rows(path: Path, *, count: int = 48, seed: int = 0) -> Path:
    """Questions in LLM-Adapters' layout whose answer is in them."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        answer = draw.choice(("true", "false"))
        instruction = (
            f"Please answer the following question with true or false, question: is it {answer}?\n\n"
            "Answer format: true/false"
        )
        rows.append(
            {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer}
        )
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def instructions(base: Path, rows: Path, folder: Path, method: str, **trainer: Any) -> dict[str, Any]:
    """The configuration of a run on instructions."""
    options = METHOD_OPTIONS[method]
    if method == "sift":
        options = {key: value for key, value in options.items() if key != "exception"}
    return {
        "model": {"name": str(base)},
        "data": {
            "task": "instructions",
            "name": str(rows),
            "prompt_template": "plain",
            "sequence_length": 128,
            "validation_size": 8,
        },
        "method": {"name": method, **options},
        "trainer": {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "use_cpu": True,
            "disable_tqdm": True,
            **trainer,
        },
        "output_dir": str(folder),
    }


def write_encoder(folder: Path, kind: str = "bert", *, pooler: bool = True) -> Path:
    """A small encoder without a head, with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(tokenizer), "pad_token_id": 0, "max_position_embeddings": 40}
    if kind == "bert":
        model: Any = BertModel(BertConfig(initializer_range=0.2, **sizes), add_pooling_layer=pooler)
    else:
        config = RobertaConfig(initializer_range=0.2, type_vocab_size=2, **sizes)
        model = RobertaModel(config, add_pooling_layer=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_sst2(folder: Path) -> Path:
    """Sentences whose first word tells their class."""
    draw = random.Random(0)
    words = [str(number) for number in range(100)]

    def examples(count: int) -> list[Any]:
        labels = [draw.randrange(2) for _ in range(count)]
        return [((" ".join([("1", "2")[label], *draw.choices(words[3:], k=4)]),), label) for label in labels]

    return write_official(folder, "sst2", {"train": examples(64), "validation": examples(32)})


def classification(encoder: Path, data: Path, folder: Path, method: str, **trainer: Any) -> dict[str, Any]:
    """The configuration of a run on a task of GLUE."""
    options = {**METHOD_OPTIONS[method]}
    if method in ("galore", "fira", "apollo", "lora", "relora", "sift"):
        options["target_modules"] = TARGETS
    if method == "sift":
        options["exception"] = ["classifier", "embeddings"]
    return {
        "model": {"name": str(encoder)},
        "data": {"task": "sst2", "name": str(data), "sequence_length": 16},
        "method": {"name": method, **options},
        "trainer": {
            "num_train_epochs": 4,
            "per_device_train_batch_size": 8,
            "save_total_limit": 2,
            "use_cpu": True,
            "disable_tqdm": True,
            **trainer,
        },
        "output_dir": str(folder),
    }


def predictions(model: BertForSequenceClassification, texts: list[str]) -> list[int]:
    """The class that a model gives to each text."""
    tokens = word_tokenizer()(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return list(model.eval()(**tokens).logits.argmax(-1).tolist())
