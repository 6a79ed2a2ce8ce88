"""ReLoRA on a PEFT model inside Hugging Face's Trainer: restarts, a jagged schedule, and a resume that is the same run.

    pip install 'fullrank[train]'
    python examples/relora_peft.py

The model is made on the spot, so that the example runs anywhere; with a model of yours only the lines marked
"ReLoRA" are new. In a loop of your own, call ``relora.step()`` after ``optimizer.step()`` in place of the callback.
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fullrank import ReLoRA
from fullrank.train.restarts import ReLoRACallback

RANK = 4


def counting_text(num_sequences: int = 256, length: int = 32) -> Dataset:
    """Sequences that count upwards modulo 64 from a random start: easy to learn, quick to check."""
    starts = torch.randint(0, 64, (num_sequences, 1), generator=torch.Generator().manual_seed(0))
    tokens = (starts + torch.arange(length)) % 64
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": tokens.tolist()})


def main() -> None:
    """Train with three restarts, then resume in the middle of a cycle in a second Trainer."""
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
            model = get_peft_model(
                LlamaForCausalLM(config), LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
            )
            for (
                name,
                parameter,
            ) in model.named_parameters():  # from random weights these have to train too, as in the paper
                if any(part in name for part in ("embed", "norm", "lm_head")):
                    parameter.requires_grad_(True)
            weight = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
            before = weight.get_base_layer().weight.detach().clone()
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-2)
            relora = ReLoRA(model, optimizer, restart_every=20, restart_warmup_steps=4)  # ReLoRA
            schedule = relora.scheduler(num_training_steps=80, warmup_steps=4)  # ReLoRA
            trainer = Trainer(
                model=model,
                args=TrainingArguments(
                    output_dir=folder,
                    max_steps=80,
                    per_device_train_batch_size=16,
                    save_steps=50,
                    logging_steps=40,
                    disable_tqdm=True,
                ),
                train_dataset=text,
                optimizers=(optimizer, schedule),
                callbacks=[ReLoRACallback(relora)],  # ReLoRA
            )
            result = trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-50" if resume else None)
            change = weight.get_base_layer().weight.detach() + weight.get_delta_weight("default") - before
            total = sum(p.double().sum().item() for p in model.parameters())
            start = "resumed at 50" if resume else "uninterrupted"
            print(
                f"{start}: weights sum to {total:.10f} after {result.global_step} steps; the change of a matrix "
                f"has rank {int(torch.linalg.matrix_rank(change))}, one cycle's has {RANK}"
            )


if __name__ == "__main__":
    main()
