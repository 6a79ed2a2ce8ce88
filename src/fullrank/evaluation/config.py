"""What an evaluation can be told: one frozen dataclass, every field with its meaning and unit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

HARNESS_EXTRA = "pip install 'fullrank[eval]'"
"""What brings lm-evaluation-harness and scikit-learn."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """A trained model, the tasks to score it on, and how."""

    model: str = ""
    """A run's folder or one of its checkpoints, a model's folder or hub name; with `adapter`, its base."""
    adapter: str | None = None
    """Folder of an adapter to merge: `adapter/` of a run, what PEFT saved, or what SIFT.save_adapter wrote."""
    tasks: list[str] = field(default_factory=list)
    """Tasks and groups: perplexity, humaneval, commonsense, mmlu, glue, or a single task of a group."""
    data: dict[str, str] = field(default_factory=dict)
    """Files or folders by task or group, such as {"mmlu": "mmlu.zip"}; a task that is not named is read from the hub.
    commonsense: LLM-Adapters' folders; mmlu: Hendrycks' csv files, zipped or not; humaneval: its jsonl; glue: its tsv
    files; perplexity: any text or a hub dataset, always to be given."""
    output_dir: str = ""
    """Folder of eval.json and of the answers one by one; tasks that it holds already are not run again."""
    limit: int | None = None
    """Examples of each task at most, its first ones; null: all."""
    batch_size: int = 8
    """Sequences that go through the model at once; it changes speed and memory, numbers only by rounding."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type of the weights; null: that of the model's files."""
    device: str | None = None
    """Device as torch names it, such as cuda:0; null: the GPU if there is one, else the CPU."""
    seed: int = 42
    """Seed of what is drawn at random: HumanEval's samples."""
    num_fewshot: int = 0
    """Solved examples before each question, for MMLU (0 to 5) and for the commonsense tasks from the hub."""
    protocol: Literal["ranking", "generate"] = "ranking"
    """Commonsense: ranking (the likelier answer, as lm-evaluation-harness) or generate (LLM-Adapters' and Fira's)."""
    prompt_template: Literal["commonsense-eval", "commonsense", "alpaca", "plain", "chat"] = "commonsense-eval"
    """How the protocol generate puts an instruction to the model; commonsense-eval: as Fira's evaluation does."""
    num_beams: int = 4
    """Beams of the protocol generate."""
    answer_tokens: int = 32
    """Longest answer of the protocol generate (tokens)."""
    sequence_length: int | None = None
    """Longest sequence of perplexity and of GLUE (tokens); null: 256 for perplexity, as the papers, 512 for GLUE."""
    packing: bool = True
    """Perplexity: join documents and cut equal sequences; false: one truncated document a sequence."""
    num_tokens: int = 10_000_000
    """Perplexity: size of the text at most, its beginning (tokens)."""
    text_field: str = "text"
    """Perplexity: field of a row that holds its text."""
    subset: str | None = None
    """Perplexity: configuration of a hub dataset, such as `en` of allenai/c4."""
    split: str = "validation"
    """Perplexity: split of a hub dataset."""
    num_samples: int = 1
    """HumanEval: programs written for each problem."""
    temperature: float = 0.0
    """HumanEval: temperature of sampling; 0: the likeliest token each time."""
    top_p: float = 0.95
    """HumanEval: probability mass that is sampled from; without effect at temperature 0."""
    max_new_tokens: int = 512
    """HumanEval: longest program (tokens)."""
    humaneval_template: str | None = None
    """HumanEval: text around a problem's prompt, with {prompt} in its place; null: the prompt alone."""
    allow_code_execution: bool = False
    """HumanEval: run the programs that the model wrote on this machine, confined as docs/evaluate.md says."""
