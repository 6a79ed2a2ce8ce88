"""Small made examples of every task of GLUE, as the benchmark's files and as a dataset like the hub's."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

Example = tuple[tuple[str, ...], int | float]

WORDS = (
    "one",
    "two",
    "red",
    "blue",
    "cat",
    "dog",
    "runs",
    "sleeps",
    "here",
    "there",
    "not",
    "very",
    ".",
    "?",
    '"',
    "'s",
)

# written down from the hub's dataset cards, not taken from the code that is tested
HUB_FIELDS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
}
HUB_LABELS = {
    "cola": ("unacceptable", "acceptable"),
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "stsb": (),
    "qqp": ("not_duplicate", "duplicate"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
}
FOLDERS = {
    "cola": "CoLA",
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "stsb": "STS-B",
    "qqp": "QQP",
    "mnli": "MNLI",
    "qnli": "QNLI",
    "rte": "RTE",
}
HEADERS = {
    "cola": "",
    "sst2": "sentence\tlabel",
    "mrpc": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "stsb": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "mnli": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
    "qnli": "index\tquestion\tsentence\tlabel",
    "rte": "index\tsentence1\tsentence2\tlabel",
}
MNLI_DEV_HEADER = HEADERS["mnli"].replace("label1", "label1\tlabel2\tlabel3\tlabel4\tlabel5")
SPLITS = {"train": "train.tsv", "validation": "dev.tsv"}
MNLI_SPLITS = {
    "train": "train.tsv",
    "validation_matched": "dev_matched.tsv",
    "validation_mismatched": "dev_mismatched.tsv",
}


def splits_of(task: str) -> dict[str, str]:
    """The splits of the hub and the official files that they are."""
    return MNLI_SPLITS if task == "mnli" else SPLITS


def make_examples(task: str, count: int, *, seed: int = 0) -> list[Example]:
    """Random texts of a few words, each with its own number, and random labels."""
    draw = random.Random(f"{task} {seed}")
    examples: list[Example] = []
    for index in range(count):
        texts = tuple(" ".join([str(index), *draw.choices(WORDS, k=draw.randint(1, 9))]) for _ in HUB_FIELDS[task])
        if task == "stsb":
            label: int | float = float(np.float32(draw.randrange(51) / 10))
        else:
            label = draw.randrange(len(HUB_LABELS[task]))
        examples.append((texts, label))
    return examples


def official_line(task: str, index: int, example: Example, *, num_annotators: int = 1) -> str:
    """An example as a line of the task's file."""
    texts, number = example
    label = f"{number:.3f}" if task == "stsb" else str(number)
    if task in ("mnli", "qnli", "rte"):
        label = HUB_LABELS[task][int(number)]
    cells = {
        "cola": ["gj04", label, "*" if label == "0" else "", *texts],
        "sst2": [*texts, label],
        "mrpc": [label, "702876", "702977", *texts],
        "stsb": [str(index), "main-captions", "MSRvid", "2012test", "0001", "none", "none", *texts, label],
        "qqp": [str(index), "213221", "213222", *texts, label],
        "mnli": [str(index), "31193", "31193n", "slate", "( a )", "( b )", "(ROOT)", "(ROOT)", *texts]
        + [label] * num_annotators
        + [label],
    }
    return "\t".join(cells.get(task, [str(index), *texts, label]))


def official_text(task: str, examples: list[Example], *, file: str = "train.tsv") -> str:
    """A whole file of a task."""
    is_mnli_dev = file.startswith("dev_")
    header = MNLI_DEV_HEADER if is_mnli_dev else HEADERS[task]
    lines = [official_line(task, n, e, num_annotators=5 if is_mnli_dev else 1) for n, e in enumerate(examples)]
    return "".join(f"{line}\n" for line in ([header] if header else []) + lines)


def write_official(root: Path, task: str, content: dict[str, list[Example]]) -> Path:
    """The folder of a task under the folder of the benchmark, from examples by split; returns the benchmark's."""
    folder = root / FOLDERS[task]
    folder.mkdir(parents=True, exist_ok=True)
    for split, examples in content.items():
        name = splits_of(task)[split]
        (folder / name).write_bytes(official_text(task, examples, file=name).encode())
    return root


def write_dataset(
    root: Path, task: str, content: dict[str, list[Example]], *, label_names: tuple[str, ...] | None = None
) -> Path:
    """A dataset that is laid out as the hub's is: a configuration a task, parquet files, labels with names."""
    names = HUB_LABELS[task] if label_names is None else label_names
    kinds = {field: Value("string") for field in HUB_FIELDS[task]}
    features = Features({**kinds, "label": ClassLabel(names=list(names)) if names else Value("float32")})
    (root / task).mkdir(parents=True, exist_ok=True)
    card = ["---", "configs:", f"- config_name: {task}", "  data_files:"]
    for split, examples in content.items():
        columns = {field: [texts[n] for texts, _ in examples] for n, field in enumerate(HUB_FIELDS[task])}
        rows = Dataset.from_dict({**columns, "label": [label for _, label in examples]}, features=features)
        rows.to_parquet(root / task / f"{split}.parquet")
        card += [f"  - split: {split}", f"    path: {task}/{split}.parquet"]
    (root / "README.md").write_text("\n".join([*card, "---", ""]))
    return root


def make_content(task: str, num_train: int = 12, num_validation: int = 5) -> dict[str, list[Example]]:
    """Examples of every labelled split of a task."""
    counts = {split: num_train if split == "train" else num_validation + n for n, split in enumerate(splits_of(task))}
    return {split: make_examples(task, count, seed=n) for n, (split, count) in enumerate(counts.items())}


def word_tokenizer(*, words: tuple[str, ...] = WORDS, pad_token: str | None = "[PAD]") -> PreTrainedTokenizerFast:
    """A tokenizer of words with BERT's special tokens and types; numbers up to 99 are words too."""
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    tokens = dict.fromkeys((*special, *words, *map(str, range(100))))
    tokenizer = Tokenizer(models.WordLevel({token: n for n, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token=pad_token,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
