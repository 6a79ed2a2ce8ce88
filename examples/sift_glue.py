"""SIFT inside Hugging Face's Trainer: 1% of a model's entries learn to tell good reviews from bad ones.

    pip install 'fullrank[train]'
    python examples/sift_glue.py
    python examples/sift_glue.py --model all-MiniLM-L6-v2 --data glue/SST-2 --max_steps 500

Without arguments a tiny BERT and its reviews are made on the spot, so that the example runs anywhere. ``--data`` is a
folder with GLUE's train.tsv and dev.tsv (columns sentence and label), ``--model`` a BERT. The lines marked "SIFT" are
the new ones: choose what trains, give that to an optimizer, train as always. What was learned is a small file.
"""

from __future__ import annotations

import argparse
import csv
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from fullrank import SIFT, load_adapter

NOUNS = ["film", "plot", "cast", "story", "ending", "music"]
GOOD = ["great", "moving", "clever", "charming", "funny", "fresh"]
BAD = ["dull", "clumsy", "bland", "shallow", "tired", "loud"]
FILLERS = ["really", "quite", "rather", "so", "very", "again", "today", "indeed"]


def made_up_reviews(number: int, seed: int) -> Dataset:
    """Sentences of two clauses; both opinions are good, or both are bad."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        label = draw.randrange(2)
        opinions = draw.sample(GOOD if label else BAD, 2)
        clauses = [f"the {draw.choice(NOUNS)} is {draw.choice(FILLERS)} {opinion}" for opinion in opinions]
        rows.append({"sentence": " and ".join(clauses), "label": label})
    return Dataset.from_list(rows)


def made_up_model() -> tuple[BertForSequenceClassification, PreTrainedTokenizerFast]:
    """A BERT of two layers with random weights, and a tokenizer of whole words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "is", "and", *NOUNS, *GOOD, *BAD, *FILLERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.05,
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return BertForSequenceClassification(config), PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The base model with a new head, and its tokenizer; the same weights at each call."""
    torch.manual_seed(0)
    if args.model is None:
        return made_up_model()
    model = AutoModelForSequenceClassification.from_pretrained(args.model, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(args.model)


def read(path: Path) -> Dataset:
    """The sentences and labels of a file of GLUE."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return Dataset.from_list([{"sentence": row["sentence"].strip(), "label": int(row["label"])} for row in rows])


def reviews(args: argparse.Namespace, tokenizer: Any) -> list[Dataset]:
    """Reviews to train on and others to measure with, as tokens."""
    if args.data:
        texts = [read(args.data / "train.tsv"), read(args.data / "dev.tsv")]
    else:
        texts = [made_up_reviews(2048, seed=1), made_up_reviews(512, seed=2)]
    return [text.map(lambda row: dict(tokenizer(row["sentence"], truncation=True, max_length=64))) for text in texts]


def predictions(trainer: Trainer, dev: Dataset) -> Tensor:
    """The class that the Trainer's model gives to each review."""
    return torch.tensor(trainer.predict(dev).predictions).argmax(-1)


def run(args: argparse.Namespace, folder: str) -> None:
    """Train a share of the entries, save what changed, and put it on a fresh base."""
    model, tokenizer = load(args)
    train, dev = reviews(args, tokenizer)
    sift = SIFT(model, args.density, ["encoder.layer", "pooler"], ["classifier"])  # SIFT, step 1
    sift.print_trainable_parameters()
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=args.lr)  # SIFT, step 2
    settings = TrainingArguments(
        output_dir=folder,
        max_steps=args.max_steps,
        warmup_steps=args.max_steps // 20,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        save_strategy="no",
        report_to="none",
        logging_steps=100,
        disable_tqdm=True,
    )
    common: dict[str, Any] = {"args": settings, "processing_class": tokenizer}
    trainer = Trainer(model=model, train_dataset=train, optimizers=(optimizer, None), **common)  # SIFT, step 3
    before = predictions(trainer, dev)
    trainer.train()
    after = predictions(trainer, dev)
    labels = torch.tensor(dev["label"])
    for when, found in (("before", before), ("after", after)):
        print(f"accuracy {when}: {(found == labels).double().mean():.1%}")

    num_bytes = sift.save_adapter(f"{folder}/adapter")
    base, _ = load(args)
    load_adapter(f"{folder}/adapter").apply(base)
    again = predictions(Trainer(model=base, **common), dev)
    print(f"adapter: {num_bytes:,} bytes, the model: {sum(p.nbytes for p in base.parameters()):,} bytes")
    print(f"a fresh base with the adapter: {(again == after).sum()} of {len(after)} predictions the same")


def main() -> None:
    """Run the example in a folder that is removed afterwards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a BERT: its folder or name; default: a tiny one, made on the spot")
    parser.add_argument("--data", type=Path, help="folder with train.tsv and dev.tsv; default: made-up reviews")
    parser.add_argument("--density", type=float, default=0.01, help="share of the entries that trains")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--max_steps", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(args, folder)


if __name__ == "__main__":
    main()
