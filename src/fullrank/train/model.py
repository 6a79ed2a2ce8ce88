"""The network to train: a LLaMA of the papers by its size, or any causal LM from a folder or the hub.

ReLoRA (https://arxiv.org/abs/2307.05695), GaLore (https://arxiv.org/abs/2403.03507) and Fira
(https://arxiv.org/abs/2410.01623) pre-train the same family of LLaMA models, from 9M to 7B parameters.
`PAPER_SIZES` holds their dimensions, so that a published run is named by its size alone.

Departures from the authors' configurations:

- the vocabulary is the tokenizer's (theirs: 32000, or 32100 in ReLoRA and in the 100m file of all three);
- their ``pad_token_id`` of -1 makes the last row of the embedding untrainable in transformers; here it is the
  tokenizer's, and none where that is also the end token, which has to be learned;
- ``max_sequence_length`` is ``max_position_embeddings`` in transformers, and grows with the data's sequence
  length for a fresh model.
"""

from __future__ import annotations

import logging
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from fullrank.errors import ConfigError, first_line
from fullrank.train.config import ModelConfig
from fullrank.weights import holds_parts, read_weights

logger = logging.getLogger(__name__)


class PaperSize(NamedTuple):
    """Dimensions of one LLaMA of the papers; the names are transformers'."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 1024


PAPER_SIZES: dict[str, PaperSize] = {
    "llama-9m": PaperSize(128, 352, 4, 4),
    "llama-20m": PaperSize(256, 688, 4, 4),
    "llama-35m": PaperSize(384, 1024, 6, 8),
    "llama-40m": PaperSize(416, 1024, 8, 8),
    "llama-60m": PaperSize(512, 1376, 8, 8),
    "llama-71m": PaperSize(512, 1368, 12, 8),
    "llama-100m": PaperSize(640, 1708, 12, 10),
    "llama-130m": PaperSize(768, 2048, 12, 12),
    "llama-250m": PaperSize(768, 2560, 24, 16),
    "llama-350m": PaperSize(1024, 2736, 24, 16),
    "llama-1b": PaperSize(2048, 5461, 24, 32),
    "llama-3b": PaperSize(2560, 6848, 32, 32),
    "llama-7b": PaperSize(4096, 11008, 32, 32, max_position_embeddings=2048),
}
"""Size -> dimensions, equal in Guitaricet/relora and jiaweizzhao/GaLore (``configs/llama_*.json``) and in
xichen-fy/Fira (``pre_training_c4/llama_configs/llama_*.json``). RMSNorm epsilon 1e-6, initial standard
deviation 0.02, SiLU, untied embeddings."""

_SET_ELSEWHERE = {
    "attn_implementation": "Set model.attn_implementation.",
    "bos_token_id": "It comes from the tokenizer: set data.tokenizer.",
    "dtype": "Set model.dtype.",
    "eos_token_id": "It comes from the tokenizer: set data.tokenizer.",
    "model_type": "Set model.name to another model.",
    "pad_token_id": "It comes from the tokenizer: set data.tokenizer.",
    "torch_dtype": "Set model.dtype.",
    "use_cache": "Training has no use for the key-value cache; it is always off.",
}


def build_model(
    config: ModelConfig,
    *,
    vocab_size: int,
    pad_token_id: int | None,
    eos_token_id: int | None,
    bos_token_id: int | None,
    sequence_length: int,
    seed: int,
) -> PreTrainedModel:
    """Build the model on the CPU, with fresh weights from `seed` or the pretrained ones.

    Fresh weights are drawn in float32 and then rounded to ``config.dtype``, so a float32 and a bfloat16 run
    start from the same point. The global random state is left as it was.

    Args:
        config: The model section of a run.
        vocab_size: Length of the tokenizer (tokens).
        pad_token_id: Padding token of the tokenizer, if any.
        eos_token_id: End token of the tokenizer.
        bos_token_id: Begin token of the tokenizer, if any.
        sequence_length: Length of a training sequence (tokens).
        seed: Seed of the fresh weights; unused for pretrained ones.

    Returns:
        The model in training mode, its parameters in ``config.dtype``, the key-value cache off.

    Raises:
        ConfigError: If the name, an override, the vocabulary or the length cannot work.
    """
    network = network_config(config, vocab_size=vocab_size)
    fit_length(network, config, sequence_length=sequence_length)
    # an embedding's padding row gets no gradient: an end token that doubles as padding would never be learned
    network.pad_token_id = None if pad_token_id == eos_token_id else pad_token_id
    network.eos_token_id = eos_token_id
    network.bos_token_id = bos_token_id
    network.use_cache = False
    model = _pretrained(network, config) if config.pretrained else _fresh(network, config, seed=seed)
    model.train()
    logger.info("%s: %d parameters in %s", config.name, model.num_parameters(), config.dtype)
    return model


def network_config(config: ModelConfig, *, vocab_size: int) -> PreTrainedConfig:
    """Dimensions of the network with the overrides applied and the vocabulary settled."""
    for key in config.overrides:
        if key in _SET_ELSEWHERE:
            raise ConfigError(f"model.overrides cannot set {key}. {_SET_ELSEWHERE[key]}")
    try:
        if config.name in PAPER_SIZES:
            network = _paper_config(config, vocab_size=vocab_size)
        else:
            network = _named_config(config, vocab_size=vocab_size)
    except (StrictDataclassError, TypeError) as error:
        raise ConfigError(
            f"model.overrides {config.overrides} do not fit {config.name}: {' '.join(str(error).split())} "
            "Change or remove them."
        ) from error
    if network.vocab_size < vocab_size:
        raise ConfigError(
            f"the tokenizer has {vocab_size} tokens, more than the {network.vocab_size} rows in the "
            f"embedding of {config.name}. Set data.tokenizer to the model's own, or drop the override of vocab_size."
        )
    return network


def _paper_config(config: ModelConfig, *, vocab_size: int) -> PreTrainedConfig:
    """Configuration of a paper's LLaMA."""
    if config.revision is not None:
        raise ConfigError(
            f"model.revision {config.revision!r} belongs to a hub model, and {config.name} is a size of the papers. "
            "Leave it out."
        )
    if config.pretrained:
        raise ConfigError(
            f"model.pretrained needs weights, and {config.name} is a size of the papers, which has none. Set "
            "model.pretrained to false, or model.name to a folder or hub name."
        )
    _check_overrides(config, known=LlamaConfig().to_dict())
    fields = PAPER_SIZES[config.name]._asdict() | {"vocab_size": vocab_size, "rms_norm_eps": 1e-6}
    return LlamaConfig(**(fields | config.overrides))


def _named_config(config: ModelConfig, *, vocab_size: int) -> PreTrainedConfig:
    """Configuration of a model from a folder or the hub."""
    hint = f"Sizes of the papers: {', '.join(PAPER_SIZES)}."
    close = get_close_matches(config.name.lower(), PAPER_SIZES, n=1, cutoff=0.75)
    if close:
        hint = f"Did you mean {close[0]}? {hint}"
    # nothing on the hub is called so: do not wait for the network to say it
    if config.name.startswith("llama-") and not Path(config.name).is_dir():
        raise ConfigError(f"model.name {config.name!r} is not a size of the papers. {hint}")
    try:
        base = AutoConfig.from_pretrained(config.name, revision=config.revision, trust_remote_code=False)
        raw, _ = PreTrainedConfig.get_config_dict(config.name, revision=config.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.name {config.name!r} is not a size of the papers, nor a folder with a config.json, nor a "
            f"model the hub gives us ({first_line(error)}). {hint} Without a network, name a local folder."
        ) from error
    if not hasattr(base, "vocab_size"):
        raise ConfigError(f"model {config.name} ({base.model_type}) has no vocabulary. Name a causal language model.")
    _check_overrides(config, known=base.to_dict())
    fields = raw | ({} if config.pretrained else {"vocab_size": vocab_size}) | config.overrides
    # built anew, not patched: what the class derives (the head size) then follows the overrides
    network: PreTrainedConfig = type(base).from_dict(fields)
    return network


def _check_overrides(config: ModelConfig, *, known: dict[str, Any]) -> None:
    """Refuse an override of a field that the model's configuration does not have."""
    for key in config.overrides:
        if key not in known:
            close = get_close_matches(key, known, n=1)
            remedy = f"Did you mean {close[0]}?" if close else f"Its fields: {', '.join(sorted(known))}."
            raise ConfigError(f"model.overrides has {key!r}, which model {config.name} does not know. {remedy}")


def fit_length(network: PreTrainedConfig, config: ModelConfig, *, sequence_length: int) -> None:
    """Check the longest position against the data; a fresh model without an explicit bound grows to fit."""
    bound = getattr(network, "max_position_embeddings", None)
    if bound is None or sequence_length <= bound:
        return
    if config.pretrained or "max_position_embeddings" in config.overrides:
        raise ConfigError(
            f"data.sequence_length must be at most {bound} (max_position_embeddings of {config.name}), "
            f"got {sequence_length}. Lower data.sequence_length."
        )
    network.max_position_embeddings = sequence_length


def _fresh(network: PreTrainedConfig, config: ModelConfig, *, seed: int) -> PreTrainedModel:
    """Draw new weights without touching anyone else's random numbers."""
    dtype = getattr(torch, config.dtype)
    causal_lm: Any = AutoModelForCausalLM  # its methods carry no types
    # the CPU's alone: torch.manual_seed would also reseed the accelerators, which the fork does not restore
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            model: PreTrainedModel = causal_lm.from_config(
                network,
                dtype=torch.float32,
                attn_implementation=config.attn_implementation,
                trust_remote_code=False,
            )
        except (ValueError, TypeError, ImportError, RuntimeError, ArithmeticError) as error:
            raise unbuildable(config, error) from error
    for parameter in model.parameters():  # not model.to(dtype): the rotary tables stay in float32
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def _pretrained(network: PreTrainedConfig, config: ModelConfig) -> PreTrainedModel:
    """Load every weight of the model from its safetensors files, or refuse."""
    causal_lm: Any = AutoModelForCausalLM  # its methods carry no types
    if holds_parts(config.name):
        return _folded(network, config)
    try:
        model, report = causal_lm.from_pretrained(
            config.name,
            revision=config.revision or "main",
            config=network,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except OSError as error:
        raise ConfigError(
            f"model {config.name} has no weights in safetensors files ({first_line(error)}). Save it with "
            "save_pretrained, or set model.pretrained to false."
        ) from error
    except RuntimeError as error:  # transformers has logged which weights
        raise ConfigError(
            f"the weights of {config.name} do not have the shapes that model.overrides {config.overrides} ask for. "
            "Remove those overrides, or set model.pretrained to false."
        ) from error
    except (ValueError, ImportError) as error:
        raise unbuildable(config, error) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ConfigError(
            f"the files of {config.name} lack {len(missing)} weights of the model, first {missing[0]}. "
            "Remove the override that asks for them, or name a model saved with its language-model head."
        )
    loaded: PreTrainedModel = model
    return loaded


def _folded(network: PreTrainedConfig, config: ModelConfig) -> PreTrainedModel:
    """The model of a run's checkpoint with LoRA's factors, each added to its weight, or with codes, decoded."""
    weights = read_weights(config.name)
    model = _fresh(network, config, seed=0)
    try:
        model.load_state_dict({name: weights.read(name) for name in weights.shapes}, strict=False)
    except RuntimeError as error:
        raise ConfigError(
            f"the weights of {config.name} do not have the shapes that model.overrides {config.overrides} ask for. "
            "Remove those overrides."
        ) from error
    if missing := missing_weights(model, set(weights.shapes)):
        raise ConfigError(
            f"the files of {config.name} lack {len(missing)} weights of the model, first {missing[0]}. Remove the "
            "override that asks for them."
        )
    return model


def missing_weights(model: nn.Module, names: set[str]) -> list[str]:
    """The weights of a model that are not among these names, but for those that are tied to another."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return sorted(set(model.state_dict()) - names - tied)


def longest_sequence(model: nn.Module) -> int | None:
    """Tokens that a model takes at most; None if it does not say."""
    bound: int | None = getattr(model.config, "max_position_embeddings", None)
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            # RoBERTa and its kin number positions from behind the padding token
            bound = table.num_embeddings - table.padding_idx - 1
    return bound


def unbuildable(config: ModelConfig, error: Exception) -> ConfigError:
    """The error for a model that transformers refuses to construct."""
    return ConfigError(
        f"transformers cannot build {config.name} with model.overrides {config.overrides} and "
        f"model.attn_implementation {config.attn_implementation}: {first_line(error)} Change what it names."
    )
