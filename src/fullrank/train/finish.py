"""The end of a run: the last score, the model's folders, and ``result.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer

from fullrank import memory
from fullrank.fused import FusedBackward
from fullrank.methods import Built
from fullrank.sharding import is_fully_sharded
from fullrank.train import report
from fullrank.train.coded import decode_
from fullrank.train.config import RunConfig
from fullrank.train.data.prepared import IGNORED, Data
from fullrank.train.sharded import FSDP2, strategy_of
from fullrank.train.trainer import keeps_best

if TYPE_CHECKING:
    from fullrank.train.adapters import Adapters

PROMPT = "The"


def finish(
    config: RunConfig,
    trainer: Trainer,
    data: Data,
    *,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    sizes: dict[str, int],
    built: Built,
    adapters: Adapters | None,
    fused: FusedBackward | None = None,
) -> dict[str, Any]:
    """Write the trained model, an adapter if there is one, ``loss.png`` and, last, ``result.json``."""
    kept = (keeps_best(config) and trainer.state.best_global_step) or trainer.state.global_step
    before, after = score_at(trainer, 0), score_at(trainer, kept)
    weight_bytes = memory.weight_bytes(trainer.accelerator.unwrap_model(trainer.model))  # before factors are merged
    model, sizes = save_trained(config, trainer, folder, sizes, built=built, adapters=adapters)
    optimizer: Any = trainer.optimizer
    accumulates = trainer.args.gradient_accumulation_steps > 1
    gradients = fused.gradient_bytes(accumulates=accumulates) if fused else memory.gradient_bytes(optimizer)
    result = {
        "method": config.method_name,
        "model": config.model.name,
        "task": getattr(config.data, "task", "pretrain"),
        "prompt_template": data.prompt_template,
        "content_hash": data.content_hash,
        "seed": config.seed,
        "steps": trainer.state.global_step,
        "kept_step": kept,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "eval_loss": after.get("loss"),
        "perplexity": after.get("perplexity"),
        "perplexity_before": before.get("perplexity"),
        "metric": data.scoring.metric,
        "scores": after,
        "scores_before": before,
        **sizes,
        "weight_bytes": weight_bytes,
        "optimizer_state_bytes": memory.held_state_bytes(getattr(optimizer, "optimizer", optimizer)),
        "gradient_bytes": gradients,
        "peak_memory_bytes": memory.peak_memory_bytes(),
        "step_time_median_s": report.median_step_time(folder),
        "sample": None if data.label_names else write_sample(model, tokenizer, data, seed=config.seed),
        "folder": str(folder),
        "versions": report.versions(),
        "hardware": report.hardware(),
    }
    if trainer.is_world_process_zero():
        name = Path(config.model.name).name if Path(config.model.name).is_dir() else config.model.name
        report.draw_loss(folder, title=f"{name}, {config.method_name}", unit=loss_unit(data))
        report.write_whole(folder / "result.json", json.dumps(result, indent=2))  # last: it says that the run has ended
    return result


def loss_unit(data: Data) -> str:
    """What the loss counts."""
    per_example = "squared error" if len(data.label_names) == 1 else "nats per example"
    return per_example if data.label_names else "nats per token"


def score_at(trainer: Trainer, step: int) -> dict[str, float]:
    """The metrics of a step, from the Trainer's own history: the same on all ranks, and kept by checkpoints."""
    rows = [row for row in trainer.state.log_history if report.is_score(row, step)]
    return report.scores_in(rows[-1]) if rows else {}


def save_trained(
    config: RunConfig,
    trainer: Trainer,
    folder: Path,
    sizes: dict[str, int],
    *,
    built: Built,
    adapters: Adapters | None,
) -> tuple[PreTrainedModel, dict[str, int]]:
    """Write an adapter, if the base was a trained model, and the plain model; both it and the sizes come back."""
    save_adapter = adapters.save if adapters is not None and adapters.request.keeps_base else built.save_adapter
    is_spread = strategy_of(config) == FSDP2  # then all processes gather, and the first one writes
    if config.model.pretrained and save_adapter is not None and (is_spread or trainer.is_world_process_zero()):
        sizes = sizes | {"adapter_bytes": save_adapter(folder / "adapter")}
    model: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model)
    if adapters is not None:
        adapters.remove()
    elif config.model.quantization is not None:
        decode_(model, built, config)
    vars(model).pop("save_pretrained")  # under transformers' own names again
    trainer.save_model(str(folder / "model"))
    return model, sizes


def write_sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: Data, *, seed: int) -> str:
    """A short text by the trained model, sampled with a fixed seed; a fine-tuned one answers its first example."""
    model.eval()
    prompt = first_prompt(data) or tokenizer(PROMPT)["input_ids"]
    tokens = torch.tensor([prompt], device=model.device)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        generate: Any = model.generate
        output = generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=40,
            do_sample=True,
            top_k=40,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            synced_gpus=is_fully_sharded(model),  # no process ends before the others, which gather with it
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def first_prompt(data: Data) -> list[int]:
    """The tokens before the answer of the first example; none where the loss counts from the start."""
    rows: Any = data.train if data.validation is None else data.validation
    row = next(iter(rows))
    labels = row.get("labels", row["input_ids"])
    answers = [place for place, label in enumerate(labels) if label != IGNORED]
    return list(row["input_ids"][: answers[0]]) if answers else []
