"""Fira inside Hugging Face's Trainer: nothing to subclass, checkpoints and resume as always.

    pip install 'fullrank[train]'
    python examples/hf_trainer.py

The model is made on the spot, so that the example runs anywhere; with a model of yours only the two lines
marked "Fira" are new.
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fullrank import FiraAdamW, divide_params


def counting_text(num_sequences: int = 256, length: int = 32) -> Dataset:
    """Sequences that count upwards modulo 64 from a random start: easy to learn, quick to check."""
    starts = torch.randint(0, 64, (num_sequences, 1), generator=torch.Generator().manual_seed(0))
    tokens = (starts + torch.arange(length)) % 64
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": tokens.tolist()})


def main() -> None:
    """Train, stop, and resume from the checkpoint in a second Trainer."""
    text = counting_text()
    with tempfile.TemporaryDirectory() as folder:
        for resume in (False, True):
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=64,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
            )
            model = LlamaForCausalLM(config)
            param_groups = divide_params(model, target_modules_list=["attn", "mlp"], rank=8)  # Fira
            optimizer = FiraAdamW(param_groups, lr=5e-3, update_proj_gap=50)  # Fira
            trainer = Trainer(
                model=model,
                args=TrainingArguments(
                    output_dir=folder,
                    max_steps=60,
                    per_device_train_batch_size=16,
                    save_steps=30,
                    logging_steps=30,
                    disable_tqdm=True,
                ),
                train_dataset=text,
                optimizers=(optimizer, None),
            )
            result = trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-30" if resume else None)
            total = sum(p.double().sum().item() for p in model.parameters())
            start = "resumed at 30" if resume else "uninterrupted"
            print(f"{start}: weights sum to {total:.10f} after {result.global_step} steps")


if __name__ == "__main__":
    main()
