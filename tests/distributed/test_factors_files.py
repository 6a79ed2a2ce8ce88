"""The methods lora and relora on a transformers model under FSDP2, from PEFT's layers to the files at the end."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard

from fullrank import METHODS
from fullrank.sharding import is_sharded, reshard
from tests.distributed.case import Case, Place, each, named
from tests.distributed.loop import DEVICE, place, whole

pytestmark = pytest.mark.slow

LR, STEPS, BATCH, VOCABULARY = 1e-2, 5, 6, 23
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"trainable_scaling": True, "train_norms": False},
    "relora": {"restart_every": 2, "restart_warmup_steps": 1, "trainable_scaling": True},
}


def llama() -> Any:
    """Two layers, whose embedding is the head; gradient checkpointing is on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCABULARY, tie_word_embeddings=True)).to(DEVICE)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def tokens(step: int) -> Tensor:
    return torch.randint(VOCABULARY, (BATCH, 8), generator=torch.Generator().manual_seed(step)).to(DEVICE)


def finished(method: str, folder: Path) -> dict[str, Any]:
    """Train as the command does, and write everything that it can write at the end."""
    from fullrank.train.adapters import Adapters

    config = METHODS[method].config(lr=LR, rank=2, target_modules=["attn", "mlp"], **OPTIONS[method])
    request = METHODS[method].adapters
    model = llama()
    adapters = Adapters(model, request(config))  # type: ignore[misc, arg-type]
    if distributed.is_initialized():
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    built = METHODS[method].build(model, config)
    rank, world = place()
    for step in range(STEPS):
        model.zero_grad()
        data = tokens(step)[rank::world]
        model(input_ids=data, labels=data).loss.backward()
        built.optimizer.step()
        if built.after_step is not None:
            built.after_step(step + 1)
    adapter_bytes = adapters.save(folder / "adapter")
    adapters.save_plain(folder / "plain")
    before = logits(model)
    assert any(is_sharded(parameter) for parameter in model.parameters()) == distributed.is_initialized()
    adapters.remove()
    after = logits(model)
    reshard(model)
    assert any(is_sharded(parameter) for parameter in model.parameters()) == distributed.is_initialized()
    merged = {f"merged.{name}": whole(parameter.detach()) for name, parameter in model.named_parameters()}
    return {"before": before, "after": after, "adapter_bytes": adapter_bytes, **merged}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=tokens(100)).logits.cpu().clone()
    return found


def run(where: Place, *, method: str) -> dict[str, Any]:
    return finished(method, folder_of(where.folder, method, where.world))


def folder_of(folder: Path, method: str, world: int) -> Path:
    return folder / f"factor-files-{method}-{world}"


CASES = named(*(Case(f"files-{method}", functools.partial(run, method=method)) for method in OPTIONS))


@functools.cache
def alone(method: str, folder: Path) -> dict[str, Any]:
    return finished(method, folder_of(folder, method, 1))


def files(folder: Path) -> Iterator[str]:
    return (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file())


def settings(file: Path) -> dict[str, Any]:
    """What a file says; PEFT writes a set in any order."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return {key: sorted(value) if isinstance(value, list) else value for key, value in content.items()}


@each(CASES.values())
def test_the_end_of_a_run_is_that_of_one_process(case: Case, world: int, outcome: Any, launcher: Any) -> None:
    """Merged weights, adapter, plain model: written once, by the first process, under the same names."""
    method = case.name.removeprefix("files-")
    found, expected = outcome(case, world), alone(method, launcher.folder)
    assert [bool(one.values["adapter_bytes"]) for one in found] == [True] + [False] * (world - 1)
    assert found[0].values["adapter_bytes"] == pytest.approx(expected["adapter_bytes"], abs=16)
    for one in found:
        assert one.tensors.keys() == {name for name, value in expected.items() if isinstance(value, Tensor)}
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(one.tensors["after"], one.tensors["before"], rtol=1e-4, atol=1e-5)
    ours, theirs = (folder_of(launcher.folder, method, number) for number in (world, 1))
    assert list(files(ours)) == list(files(theirs))
    for name in files(theirs):
        if name.endswith(".safetensors"):
            torch.testing.assert_close(load_file(ours / name), load_file(theirs / name), rtol=1e-4, atol=2e-6)
        elif name.endswith(".json"):
            assert settings(ours / name) == settings(theirs / name), name


def test_the_saved_adapter_is_the_trained_model(launcher: Any) -> None:
    """PEFT puts what two processes saved on the base."""
    from peft import PeftModel

    launcher.launch(2)
    folder = folder_of(launcher.folder, "lora", 2)
    model: Any = PeftModel.from_pretrained(llama(), str(folder / "adapter"))
    expected = alone("lora", launcher.folder)["before"]
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
