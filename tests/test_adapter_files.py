"""Files of adapters: what is refused when one is read, and how one is written."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fullrank import SIFT, CheckpointError, ConfigError, load_adapter
from tests.reference.sift import LINEAR, llama, train

LAST = "model.layers.1.mlp.down_proj.weight"


def trained_sift(first: int) -> SIFT:
    """Three steps from this batch on, a dense head beside."""
    model = llama()
    sift = SIFT(model, 0.1, LINEAR, ["lm_head"])
    train(model, torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2), range(first, first + 3))
    return sift


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter; copy it before changing it."""
    folder = tmp_path_factory.mktemp("adapter")
    trained_sift(0).save_adapter(folder)
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> None:
    """Change description and tensors, with a checksum that fits again."""
    tensors, path = load_file(folder / "adapter.safetensors"), folder / "adapter.json"
    description = json.loads(path.read_text())
    change(description, tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter.safetensors")
    if "sha256" in description:
        content = (folder / "adapter.safetensors").read_bytes()
        description["sha256"] = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(description))


def entry(key: str, value: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    """Change what the description says of the last weight."""
    return lambda description, tensors: description["weights"][LAST].update({key: value})


def part(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    """Change a tensor of the last weight: all others would be applied before it."""
    return lambda description, tensors: tensors.update({f"{LAST}.{key}": change(tensors[f"{LAST}.{key}"])})


WRONG: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
    "a later format": lambda description, tensors: description.update(format=2),
    "no format": lambda description, tensors: description.pop("format"),
    "no weights": lambda description, tensors: description.pop("weights"),
    "weights as a list": lambda description, tensors: description.update(weights=[LAST]),
    "no base": lambda description, tensors: description.pop("base"),
    "an empty base": lambda description, tensors: description.update(base={}),
    "a base as a list": lambda description, tensors: description.update(base=[LAST]),
    "no checksum": lambda description, tensors: description.pop("sha256"),
    "a weight without tensors": lambda description, tensors: description["weights"].update(
        other=description["weights"][LAST]
    ),
    "a dense weight without a tensor": lambda description, tensors: description["dense"].append("other"),
    "an unknown granularity": entry("granularity", "column"),
    "blocks of size 0": lambda description, tensors: description["weights"][LAST].update(
        granularity="block", block_size=0
    ),
    "blocks that do not fit": lambda description, tensors: description["weights"][LAST].update(
        granularity="block", block_size=7
    ),
    "a shape of words": entry("shape", ["a", "b"]),
    "an empty shape": entry("shape", [0, 16]),
    "no shape": lambda description, tensors: description["weights"][LAST].pop("shape"),
    "places above": part("units", lambda units: torch.cat((units[:-1], torch.tensor([10_000], dtype=units.dtype)))),
    "places below": part("units", lambda units: torch.cat((torch.tensor([-1], dtype=units.dtype), units[1:]))),
    "a place twice": part("units", lambda units: torch.cat((units[:1], units[:-1]))),
    "places out of order": part("units", lambda units: units.flip(0)),
    "places of the wrong type": part("units", lambda units: units.float()),
    "places as flags": part("units", lambda units: units > 0),
    "places in two dimensions": part("units", lambda units: units[None]),
    "differences in two dimensions": part("delta", lambda delta: delta[None]),
    "differences as integers": part("delta", lambda delta: delta.int()),
    "fewer differences": part("delta", lambda delta: delta[:-1]),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_files_that_contradict(
    change: Callable[[dict[str, Any], dict[str, Tensor]], Any], written: Path, tmp_path: Path
) -> None:
    """Whole, but not what save_adapter writes: refused when it is read, with the folder's name."""
    folder = Path(shutil.copytree(written, tmp_path / "copy"))
    rewrite(folder, lambda description, tensors: None)
    load_adapter(folder).apply(llama())
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match="copy"):
        load_adapter(folder)


def flip_a_byte(content: bytes) -> bytes:
    """One bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "a flipped bit": flip_a_byte,
    "cut off": lambda content: content[:-10],
    "empty": lambda content: b"",
    "other content": lambda content: b"x" * 100,
    "no text": lambda content: b"\xff\xfe{}",
    "a list": lambda content: b"[1, 2]",
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.json"])
def test_broken_files(name: str, change: Callable[[bytes], bytes], written: Path, tmp_path: Path) -> None:
    """Told by the checksum, or because it cannot be parsed."""
    folder = Path(shutil.copytree(written, tmp_path / "copy"))
    content = (folder / name).read_bytes()
    if name == "adapter.json" and change is flip_a_byte:
        content = content.replace(b'"sha256"', b'"sha257"')
    else:
        content = change(content)
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="copy"):
        load_adapter(folder)


def test_garbage_with_its_own_checksum(written: Path, tmp_path: Path) -> None:
    """No safetensors file at all."""
    folder = Path(shutil.copytree(written, tmp_path / "copy"))
    description = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.safetensors").write_bytes(b"x" * 100)
    description["sha256"] = hashlib.sha256(b"x" * 100).hexdigest()
    (folder / "adapter.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="copy"):
        load_adapter(folder)


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.json"])
def test_a_missing_file(name: str, written: Path, tmp_path: Path) -> None:
    """Named."""
    folder = Path(shutil.copytree(written, tmp_path / "copy"))
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load_adapter(folder)


def test_tensors_of_another_adapter(written: Path, tmp_path: Path) -> None:
    """Files of two folders mixed up: same names and shapes, other numbers."""
    folder = Path(shutil.copytree(written, tmp_path / "copy"))
    trained_sift(5).save_adapter(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "adapter.safetensors", folder)
    with pytest.raises(CheckpointError, match="another adapter"):
        load_adapter(folder)


# Writing.


def test_nothing_to_save(tmp_path: Path) -> None:
    """Before the first gradient; no folder is left behind."""
    sift = SIFT(llama(), 0.1, LINEAR)
    with pytest.raises(ConfigError, match="Train first"):
        sift.save_adapter(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", ["float16", "bf16", "", None])
def test_wrong_dtype(dtype: Any, tmp_path: Path) -> None:
    """Named, with what there is; nothing is written."""
    with pytest.raises(ConfigError, match=rf"bfloat16, float32, got {re.escape(repr(dtype))}"):
        trained_sift(0).save_adapter(tmp_path / "new", dtype=dtype)
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    """The folder's name is taken by a file, which stays."""
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ConfigError, match="taken is a file"):
        trained_sift(0).save_adapter(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_folder_is_written_again(tmp_path: Path) -> None:
    """An older adapter there is replaced as a whole, other files stay, nothing half-written is left."""
    (tmp_path / "notes.txt").write_text("mine")
    trained_sift(5).save_adapter(tmp_path)
    sift = trained_sift(0)
    sift.save_adapter(tmp_path, dtype="float32")
    assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", "adapter.safetensors", "adapter.json"}
    base = llama()
    load_adapter(tmp_path).apply(base)
    for name, value in sift.model.state_dict().items():
        torch.testing.assert_close(base.state_dict()[name], value, rtol=0, atol=1e-7)


def test_what_the_description_says(written: Path) -> None:
    """Enough to find the base and to know how it was trained."""
    description = json.loads((written / "adapter.json").read_text())
    assert description["format"] == 1
    assert description["method"] == "sift"
    assert description["settings"]["density"] == 0.1
    assert description["model"]["architecture"] == "LlamaForCausalLM"
    assert description["dense"] == ["lm_head.weight"]
    assert description["weights"][LAST] == {"shape": [16, 24], "granularity": "entry", "block_size": 1}
    assert description["versions"]["torch"] == torch.__version__
    assert description["base"].keys() == llama().state_dict().keys() - {"lm_head.weight"}
