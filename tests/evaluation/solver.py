"""Made problems in HumanEval's layout, and a tiny LLaMA that learned by heart what to answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fullrank.train.data.tokenizer import train_bpe

ANSWERS = {
    "add": ("x + 1", "    return x + 1\n"),
    "twice": ("2 * x", "    y = x\n    return y + x\n"),
    "half": ("x // 2", "    return x\n"),
}
"""Function -> what its test compares with, and what the model learns to write: of `half` it is wrong."""


def problems() -> list[dict[str, Any]]:
    return [
        {
            "task_id": f"Made/{name}",
            "prompt": f'def {name}(x):\n    """ Give {name} of x. """\n',
            "entry_point": name,
            "canonical_solution": f"    return {wanted}\n",
            "test": f"def check(candidate):\n    for x in range(2, 9):\n        assert candidate(x) == {wanted}\n",
        }
        for name, (wanted, _) in ANSWERS.items()
    ]


def write_problems(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    rows = problems() if rows is None else rows
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answer(row: dict[str, Any]) -> str:
    """What the model learns to write for a problem, with what is to be cut off."""
    return ANSWERS[row["entry_point"]][1] + "\ndef next"


def lessons() -> list[str]:
    return [row["prompt"] + answer(row) for row in problems()]


def _tokens(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> list[int]:
    """A lesson with a border of tokens behind the prompt, where the model is to go on."""
    prompt, whole = tokenizer.encode(row["prompt"]), tokenizer.encode(row["prompt"] + answer(row))
    if whole[: len(prompt)] == prompt:
        return whole
    return prompt + tokenizer.encode(answer(row), add_special_tokens=False)


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that writes spaces as LLaMA's does, and drops the first space of what it decodes as that one does."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        # LLaMA's pieces do not cross lines
        [line + "\n" for text in lessons() for line in text.split("\n")],
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(iter(lessons() * 3), vocab_size=350)


def train_solver(tokenizer: PreTrainedTokenizerFast, *, steps: int = 120) -> LlamaForCausalLM:
    """A LLaMA that writes the answers above, the likeliest token each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    rows = [torch.tensor(_tokens(tokenizer, row)) for row in problems()]
    inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = model(input_ids=inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
