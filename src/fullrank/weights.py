"""The weights of a folder by name, one in memory at a time: a model, a run, or a checkpoint with LoRA's factors.

Names and shapes come from the headers of the safetensors files. A checkpoint of `lora` or `relora` holds the
base W and the factors A, B of a layer X apart (PEFT's names X.base_layer.weight, X.lora_A.default.weight and
X.lora_B.default.weight): here it has one weight X.weight = W + scale * B A, the one the model computes with.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fullrank.errors import CheckpointError, ConfigError, UnsupportedError
from fullrank.ops.codes import QUANT_STATE, coded_layers, decode, decoded_shape
from fullrank.ops.merge import product

Shapes = dict[str, tuple[int, ...]]
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
MARKER = "fullrank.json"
"""What a complete checkpoint of ours holds: the configuration of its run, among others."""
BASE, FACTOR_A, FACTOR_B = ".base_layer.weight", ".lora_A.default.weight", ".lora_B.default.weight"
TRAINED_SCALE = ".lora_scaling.default"
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Types of models whose linear layers keep their weights as columns x rows."""


@dataclass(frozen=True)
class Weights:
    """Weights by name, read when they are asked for."""

    source: str
    """Where they come from, for people."""
    shapes: Shapes
    read: Callable[[str], Tensor]
    """One weight by its name: float64, on the CPU."""


def from_tensors(tensors: Mapping[str, Tensor], *, source: str) -> Weights:
    """Weights at hand, such as a model's ``state_dict()``."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Weights(source, shapes, lambda name: _float64(tensors[name], name, source))


def read_weights(folder: str | Path) -> Weights:
    """The weights in a folder of safetensors files, in a run's folder or in one of its checkpoints.

    Raises:
        ConfigError: If there is no such folder, or no weights in it.
        CheckpointError: If its files are damaged or incomplete.
        UnsupportedError: If the base of LoRA's factors is quantized.
    """
    place = weights_folder(folder)
    stored = Stored(place)
    if any(name.endswith(FACTOR_A) for name in stored.shapes):
        return _folded(stored, place)
    return Weights(str(place), stored.shapes, lambda name: _float64(stored.read(name), name, str(place)))


def stored_names(folder: str | Path) -> set[str]:
    """The names of the tensors in a folder's safetensors files; none if it holds none."""
    path = Path(folder)
    return set(Stored(path).places) if holds_model(path) else set()


def holds_model(folder: Path) -> bool:
    """Whether a folder has the weights of a model, not those of an adapter alone."""
    return any(folder.glob("model*.safetensors"))


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Name in the plain model -> name beside PEFT's layers, of everything that is not a factor."""
    return {name.replace(".base_layer.", "."): name for name in names if ".lora_" not in name}


def holds_factors(folder: str | Path) -> bool:
    """Whether a folder is a checkpoint with LoRA's factors in it, which ``read_weights`` adds to their weights."""
    return any(name.endswith(FACTOR_A) for name in stored_names(folder))


def holds_parts(folder: str | Path) -> bool:
    """Whether a folder is a checkpoint whose weights ``read_weights`` makes from parts: factors, codes."""
    if not Path(folder).is_dir():
        return False
    is_ours = (Path(folder) / MARKER).is_file()
    return holds_factors(folder) or (is_ours and bool(coded_layers(stored_names(folder))))


def weights_folder(folder: str | Path) -> Path:
    """The folder that holds the weights: the given one, or of a run ``model/``, else its newest checkpoint.

    Raises:
        ConfigError: If there is no such folder, or it is of a run that has saved nothing yet.
    """
    given = Path(folder)
    if not given.is_dir():
        raise ConfigError(f"there is no folder {given}. Give a model's folder, a run's folder, or a checkpoint of one.")
    if not _is_run(given):
        return given
    if any((given / "model").glob("*.safetensors")):
        return given / "model"
    found = {int(match[1]): path for path in given.iterdir() if (match := CHECKPOINT.fullmatch(path.name))}
    complete = [path for _, path in sorted(found.items()) if (path / MARKER).is_file()]
    if not complete:
        raise ConfigError(f"the run {given} holds no model and no complete checkpoint yet. Wait for its first save.")
    return complete[-1]


def run_folder(folder: str | Path) -> Path | None:
    """The run that a folder is of: its own, its model, adapter or one of its checkpoints; None if of no run."""
    path = Path(folder).absolute()
    if _is_run(path):
        return Path(folder)
    inside = path.name in ("model", "adapter") or CHECKPOINT.fullmatch(path.name)
    return path.parent if inside and _is_run(path.parent) else None


def label_folders(given: Sequence[str]) -> dict[str, Path]:
    """Label -> folder, from ``FOLDER`` or ``LABEL=FOLDER``; the label is otherwise the end of the path.

    It is as long an end as tells the folders apart: ``fira-1``, or ``a/model`` and ``b/model``.

    Raises:
        ConfigError: If there is none, or two have the same label.
    """
    labelled: list[tuple[str, Path]] = []
    for text in given:
        label, equals, folder = text.partition("=")
        has_label = equals and label and "/" not in label and not Path(text).exists()
        labelled.append((label, Path(folder)) if has_label else ("", Path(text)))
    ends = iter(shortest_ends([folder.absolute().parts for label, folder in labelled if not label], joined_by="/"))
    result = [(label or next(ends), folder) for label, folder in labelled]
    for label, count in Counter(label for label, _ in result).items():
        if count > 1:
            raise ConfigError(f"{count} runs are called {label!r}. Name them apart: LABEL=FOLDER.")
    if not result:
        raise ConfigError("no run was given. Give at least one folder.")
    return dict(result)


def shortest_ends(paths: Sequence[tuple[str, ...]], *, joined_by: str) -> list[str]:
    """For each path its last parts, as few as no other path ends with."""
    ends = []
    for path in paths:
        lengths = range(1, len(path))
        unlike = (n for n in lengths if not any(other[-n:] == path[-n:] for other in paths if other != path))
        ends.append(joined_by.join(path[-next(unlike, len(path)) :]))
    return ends


class Stored:
    """The tensors of a folder's safetensors files, as they are stored; weights kept as codes are decoded.

    ``places`` has every stored name, ``shapes`` and ``dtypes`` those of weights: none of what decodes another.
    """

    def __init__(self, folder: Path) -> None:
        self.places: dict[str, Path] = {}
        self.shapes: Shapes = {}
        self.dtypes: dict[str, str] = {}
        for path in _files(folder):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118, its type has no iterator
                    view = file.get_slice(name)
                    self.places[name], self.shapes[name] = path, tuple(view.get_shape())
                    self.dtypes[name] = view.get_dtype()
        self._coded = coded_layers(self.places)
        for layer, parts in self._coded.items():
            weight = f"{layer}weight"
            how = {part: self._tensor(layer + part) for part in parts if QUANT_STATE in part}
            self.shapes[weight] = decoded_shape(how, self.shapes[weight])
            self.dtypes[weight] = "F32"
            for part in parts:
                if part != "weight":
                    del self.shapes[layer + part], self.dtypes[layer + part]

    def read(self, name: str) -> Tensor:
        """A tensor by its stored name, on the host."""
        layer = name.removesuffix("weight")
        if name.endswith("weight") and layer in self._coded:
            return decode({part: self._tensor(layer + part) for part in self._coded[layer]})
        return self._tensor(name)

    def _tensor(self, name: str) -> Tensor:
        with _opened(self.places[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a model: the shards that its index names, or its only file."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            shards = sorted({folder / name for name in named})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} cannot be read as an index ({error!r}). Save the model again.") from None
        if missing := [path.name for path in shards if not path.is_file()]:
            raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which its index names. Copy it there.")
        return shards
    if (whole := folder / "model.safetensors").is_file():
        return [whole]
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    raise ConfigError(
        f"{folder} holds no model.safetensors and no model.safetensors.index.json"
        + (f", only {', '.join(found)}" if found else "")
        + ". Give a folder that save_pretrained wrote; of an adapter, the model it is merged into (`fullrank export`)."
    )


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cannot be read ({error}). Copy or save it again.") from None


def _folded(stored: Stored, folder: Path) -> Weights:
    """The weights of a checkpoint with LoRA's factors in it, each with its update added."""
    adapted = {f"{name.removesuffix(FACTOR_A)}.weight" for name in stored.shapes if name.endswith(FACTOR_A)}
    places = plain_names(stored.shapes)
    shapes = {name: stored.shapes[place] for name, place in places.items()}
    alpha = _alpha(folder)
    flipped = {name for name in adapted if _is_flipped(name, shapes, stored, folder)}
    if _has_conv1d(folder):  # a square one does not show it
        flipped |= {name for name in adapted if shapes[name][0] == shapes[name][1]}

    def read(name: str) -> Tensor:
        if name not in adapted:
            return _float64(stored.read(places[name]), name, str(folder))
        layer = name.removesuffix(".weight")
        base, a, b = (
            _float64(stored.read(layer + part), layer + part, str(folder)) for part in (BASE, FACTOR_A, FACTOR_B)
        )
        trained = layer + TRAINED_SCALE
        scale = float(stored.read(trained).double().tanh()) if trained in stored.shapes else alpha / a.shape[0]
        update = product(b, a, scale)
        return base + (update.t() if name in flipped else update)

    return Weights(str(folder), shapes, read)


def _is_flipped(name: str, shapes: Shapes, stored: Stored, folder: Path) -> bool:
    """Check the parts of a layer; whether its weight is kept as columns x rows, as transformers' Conv1D does."""
    layer = name.removesuffix(".weight")
    if absent := [part for part in (BASE, FACTOR_B) if layer + part not in stored.shapes]:
        raise CheckpointError(f"{folder} has factor A of {layer}, but no {layer + absent[0]}. Save it again.")
    if stored.dtypes[layer + BASE] not in ("F64", "F32", "F16", "BF16"):
        raise UnsupportedError(
            f"the base of {layer} in {folder} is quantized ({stored.dtypes[layer + BASE]}), so it cannot be added to. "
            "Give the folder of the merged model (model/ in the run's folder)."
        )
    rows, columns = stored.shapes[layer + FACTOR_B][0], stored.shapes[layer + FACTOR_A][1]
    if shapes[name] not in ((rows, columns), (columns, rows)):
        raise CheckpointError(
            f"the factors of {layer} in {folder} make a {rows} x {columns} matrix, its base is {shapes[name]}. Save "
            "it again."
        )
    return shapes[name] != (rows, columns)


def _has_conv1d(folder: Path) -> bool:
    """Whether a model's linear layers are transformers' Conv1D."""
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]) in CONV1D
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'}, which says how the weights lie, cannot be read ({error!r}). Give a complete "
            "checkpoint, or the folder of the merged model."
        ) from None


def _alpha(folder: Path) -> float:
    """lora_alpha of the run that wrote a checkpoint."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return float(marker["config"]["method"]["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} holds LoRA's factors, and their scale, method.lora_alpha in its {MARKER}, cannot be read "
            f"({error!r}). Give a complete checkpoint, or the folder of the merged model."
        ) from None


def _float64(tensor: Tensor, name: str, source: str) -> Tensor:
    """A weight as numbers to compute with."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UnsupportedError(
            f"{name} of {source} is stored as {kind}: quantized weights cannot be subtracted. Give the model in "
            "float32, bfloat16 or float16."
        )
    values = tensor.detach().to("cpu", torch.float64)
    if not values.isfinite().all():
        raise CheckpointError(f"{name} of {source} is not finite. Give an earlier checkpoint.")
    return values
