"""What a run can be told: one frozen dataclass a section, every field with its meaning and unit.

The sections hold numbers and names only. Nothing here imports transformers or datasets, so that
``fullrank --help`` answers at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SECTIONS = ("model", "data", "method", "trainer")
"""Of a recipe and of a run's configuration."""
PYTHON_DOCS = "python-docs"
"""The text inside this Python installation, as a ``data.name``."""
TRAINED = "bpe"
"""A tokenizer trained on the run's own text, as a ``data.tokenizer``."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network to train."""

    name: str = "llama-60m"
    """A size of the papers (llama-9m ... llama-7b), or the folder or hub name of any causal LM."""
    pretrained: bool = False
    """Start from the weights of `name` instead of fresh random ones (needs a folder or hub name)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model, such as step1000 of EleutherAI/pythia-1b; null: its main branch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the weights and gradients."""
    quantization: Literal["int8", "nf4", "nf4-double"] | None = None
    """Keep the frozen linear layers under LoRA's factors in 8 bits, in 4, or with 4-bit statistics encoded again."""
    attn_implementation: str | None = None
    """Attention kernel as transformers names it (sdpa, eager, flash_attention_2); null: its default."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's configuration to replace, such as {"num_hidden_layers": 2}."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text to train on and how it becomes sequences of tokens."""

    name: str = "python-docs"
    """python-docs (the text inside this Python installation), a file, a folder, a glob, or a hub dataset."""
    subset: str | None = None
    """Configuration of a hub dataset, such as `en` of allenai/c4."""
    split: str = "train"
    """Training split of a hub dataset."""
    validation: str | None = None
    """Validation text: a file, folder or glob, or a split of the hub dataset; null: carved from the training text."""
    text_field: str = "text"
    """Field of a row that holds its text."""
    streaming: bool = False
    """Read the dataset as a stream instead of preparing it on disk; needs trainer.max_steps."""
    shuffle_buffer: int = 10_000
    """Documents held for shuffling when streaming (documents)."""
    tokenizer: str = "bpe"
    """bpe (a byte-level BPE trained on the training text and cached), or a tokenizer's folder or hub name."""
    vocab_size: int = 4096
    """Vocabulary of a trained tokenizer (tokens); a given tokenizer brings its own."""
    sequence_length: int = 256
    """Length of one training sequence (tokens)."""
    packing: bool = True
    """Join documents with the end token and cut equal lengths; false: one padded, truncated document a sequence."""
    validation_tokens: int = 100_000
    """Size of the fixed validation set (tokens, at most)."""
    seed: int = 42
    """Seed of the carved validation set and of the stream's shuffle."""


INSTRUCTIONS = "instructions"
GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
"""What a fine-tuning run can learn: its ``data.task``."""


@dataclass(frozen=True, kw_only=True)
class TrainedModelConfig(ModelConfig):
    """The trained network to fine-tune."""

    name: str = ""
    """Folder or hub name of a trained model; to be given."""
    pretrained: bool = True
    """Fine-tuning starts from the weights of `name`: always true."""


@dataclass(frozen=True, kw_only=True)
class ExamplesConfig:
    """What every fine-tuning task is told about its examples."""

    name: str = ""
    """Files, a folder or a glob of examples, or a hub dataset; to be given."""
    subset: str | None = None
    """Configuration of a hub dataset; null: its only one, or the task's of nyu-mll/glue."""
    validation: str | None = None
    """Validation examples: a file, folder or glob, or a split of the hub dataset; null: see the task."""
    max_examples: int | None = None
    """Training examples at most, chosen at random by `seed`; null: all."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; null: the model's own."""
    sequence_length: int = 512
    """Longest example; what is beyond is cut off (tokens)."""
    seed: int = 42
    """Seed of what is chosen at random: `max_examples` and a carved validation set."""


@dataclass(frozen=True, kw_only=True)
class InstructionsConfig(ExamplesConfig):
    """Examples for a causal language model: instructions, prompts, conversations or text."""

    task: Literal["instructions"] = "instructions"
    """instructions, or a task of GLUE: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte."""
    split: str = "train"
    """Training split of a hub dataset."""
    validation_size: int = 0
    """Examples carved out for validation where `validation` is null; 0: no validation."""
    format: Literal["auto", "instruction", "prompt_completion", "messages", "text"] = "auto"
    """Fields of a row: instruction, input and output; prompt and completion; messages; text. auto: as the first row."""
    prompt_template: Literal["alpaca", "commonsense", "plain", "chat"] = "alpaca"
    """How an instruction is put to the model: Alpaca's (SIFT), LLM-Adapters' (Fira), bare, or the tokenizer's own."""
    text_field: str = "text"
    """Field of a row that holds its text, for the format text."""
    train_on_inputs: bool = False
    """Count the loss on the prompt too; false: on the answer alone."""
    packing: bool = False
    """Join whole examples to sequences of `sequence_length`; none sees another's tokens."""


@dataclass(frozen=True, kw_only=True)
class GlueConfig(ExamplesConfig):
    """Examples of a task of GLUE, for a sequence-classification model."""

    task: Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"] = "sst2"
    """The task; it decides the fields, the labels and the metric."""
    name: str = "nyu-mll/glue"
    """The hub dataset, or a folder of GLUE as it is distributed: TASK/train.tsv and TASK/dev.tsv, or these files."""


ELSEWHERE = {
    "learning_rate": "Set method.lr.",
    "weight_decay": "Set method.weight_decay.",
    "adam_beta1": "Set method.betas.",
    "adam_beta2": "Set method.betas.",
    "adam_epsilon": "Set method.eps.",
    "optim": "Set method.name.",
    "optim_args": "Set method.name and its options.",
    "optim_target_modules": "Set method.target_modules.",
    "output_dir": "Set output_dir.",
    "seed": "Set seed.",
    "eval_on_start": "A fresh run is always scored first.",
    "include_num_input_tokens_seen": "Tokens are always counted.",
    "prediction_loss_only": "A run is scored by its true token mean.",
    "batch_eval_metrics": "A run is scored by its true token mean.",
    "save_only_model": "A checkpoint without its optimizer cannot be resumed; the model alone is written at the end.",
    "ignore_data_skip": "A resumed run goes on at its place in the data.",
    "load_best_model_at_end": "The model at the end is the result.",
    "metric_for_best_model": "The model at the end is the result.",
    "greater_is_better": "The model at the end is the result.",
    "fsdp": "FSDP of accelerate makes its parameters after the method is built. Set trainer.strategy fsdp2.",
    "fsdp_config": "Set trainer.strategy fsdp2 and trainer.shard_size.",
    "deepspeed": "ZeRO flattens parameters and takes the optimizer's step over, so a method would see no matrices. Set "
    "trainer.strategy fsdp2, which spreads weights, gradients and states as well.",
    "parallelism_config": "Tensor, context and sequence parallelism are not supported. Set trainer.strategy and "
    "trainer.shard_size.",
}
"""TrainingArguments fields that the trainer section does not take, and what to do instead."""

OWN_FIELDS = ("total_batch_size", "strategy", "shard_size", "fused_backward")
"""Fields of the trainer section that are ours, not TrainingArguments'."""

BEST_MODEL = ("load_best_model_at_end", "metric_for_best_model", "greater_is_better")
"""TrainingArguments fields that say which model a run ends with."""

TRAINER_DEFAULTS: dict[str, Any] = {
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "logging_steps": 1.0,
    "logging_nan_inf_filter": False,
    "eval_strategy": "steps",
    "eval_steps": 500.0,
    "save_steps": 500.0,
    "save_total_limit": 3,
    "disable_tqdm": False,
}
"""Where a run departs from TrainingArguments' own defaults: the papers' cosine to 10%, every step logged."""


FINETUNE_ELSEWHERE = {key: value for key, value in ELSEWHERE.items() if key not in BEST_MODEL}
"""The same of a fine-tuning run, which may keep its best model."""

FINETUNE_TRAINER_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": {},
    "logging_steps": 1.0,
    "logging_nan_inf_filter": False,
    "eval_strategy": "epoch",
    "eval_steps": 500.0,
    "save_strategy": "epoch",
    "save_steps": 500.0,
    "save_total_limit": 3,
    "disable_tqdm": False,
}
"""Where a fine-tuning run departs from TrainingArguments' own defaults: scored and saved once an epoch."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that defines a run; what ``config.yaml`` in its folder holds."""

    model: ModelConfig
    data: DataConfig | InstructionsConfig | GlueConfig
    method_name: str
    method: Any
    """The options of the method, an instance of its own dataclass."""
    trainer: dict[str, Any]
    """Fields of transformers.TrainingArguments, and `OWN_FIELDS`."""
    seed: int = 42
    output_dir: str | None = None

    @property
    def command(self) -> Literal["pretrain", "finetune"]:
        """The command that makes such a run."""
        return "pretrain" if isinstance(self.data, DataConfig) else "finetune"

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain, nested values, in the layout of a recipe."""
        return {
            "model": asdict(self.model),
            "data": asdict(self.data),
            "method": {"name": self.method_name, **plain(asdict(self.method))},
            "trainer": dict(self.trainer),
            "seed": self.seed,
            "output_dir": self.output_dir,
        }


def plain(value: Any) -> Any:
    """Tuples as lists, all the way down, so that YAML and JSON hold nothing else."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
