"""A small model planned, and the same made and stepped for real, with its allocations recorded."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from fullrank import METHODS, memory
from fullrank.factors.quantize import Quantization
from fullrank.fused import FusedBackward
from fullrank.plan import Setting
from fullrank.plan.network import Network, make_network
from fullrank.plan.step import Work
from fullrank.train.adapters import Adapters
from fullrank.train.config import ModelConfig
from fullrank.train.model import build_model

VOCABULARY = 200
SHAPE = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "galore": {"rank": 16},
    "fira": {"rank": 16},
    "apollo": {"rank": 8},
    "sift": {"density": 0.05},
    "relora": {"rank": 8},
    "lora": {"rank": 8},
}


def network(num_layers: int = 4, *, dtype: Any = "float32", length: int = 32, **shape: Any) -> Network:
    overrides = SHAPE | {"num_hidden_layers": num_layers} | shape
    model = ModelConfig(name="llama-9m", dtype=dtype, overrides=overrides)
    return make_network(model, vocab_size=VOCABULARY, sequence_length=length)


def setting(method: str, of: Network | None = None, *, batch_size: int = 2, length: int = 32, **work: Any) -> Setting:
    options = replace(METHODS[method].config(), **OPTIONS[method], **work.pop("options", {}))
    return Setting(of or network(length=length), Work(method, options, length, **work), batch_size)


def measured(of: Setting, *, steps: int = 2) -> dict[str, int]:
    """Bytes that are held and the peak of so many steps; a model is made in float32, which is no part of them."""
    work, model_config = of.work, of.network.model
    with memory.tracked_peak() as made:
        model = build_model(
            model_config,
            vocab_size=VOCABULARY,
            pad_token_id=None,
            eos_token_id=1,
            bos_token_id=0,
            sequence_length=work.sequence_length,
            seed=0,
        )
        method = METHODS[work.method]
        if method.adapters is not None and (request := method.adapters(work.options)) is not None:
            kind: Any = work.quantization
            Adapters(model, request, None if kind is None else Quantization(kind, torch.device("cpu")))
    with memory.tracked_peak() as tracked:
        if work.checkpointing:
            model.gradient_checkpointing_enable()
        built = method.build(model, work.options)
        optimizer = built.optimizer
        if work.fused_backward:
            FusedBackward(optimizer, model=model)
        ids = torch.zeros(of.batch_size, work.sequence_length, dtype=torch.int64)
        for _ in range(steps):
            for _ in range(2 if work.accumulates else 1):
                with torch.autocast("cpu", dtype=torch.bfloat16) if work.autocast else nullcontext():
                    outputs = model(input_ids=ids, labels=ids)
                if work.autocast:
                    outputs = {key: value.float() for key, value in outputs.items() if torch.is_tensor(value)}
                loss = outputs["loss"]
                del outputs
                loss.backward()
                del loss
            gradients = memory.gradient_bytes(optimizer)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        values = {p for g in optimizer.param_groups for p in g["params"]} if work.method == "sift" else set()
        weights = sum(p.numel() * p.element_size() for p in model.parameters() if p not in values)
        weights += sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
        held = {"weights": weights, "gradients": gradients, "states": memory.held_state_bytes(optimizer)}
        del model, optimizer, built, ids
        gc.collect()
    return held | {"peak": made.left + tracked.peak}
