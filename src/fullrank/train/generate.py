"""Try a trained model: what it writes after a prompt, or the class it gives to a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerFast

from fullrank.errors import ConfigError
from fullrank.params import is_classifier
from fullrank.train.data.prompts import CHAT, end_of_turn, render_prompt
from fullrank.train.load import Loaded, device_named, forget_generation, load_trained


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What ``fullrank generate`` is told."""

    model: str = ""
    """To be given: a run's folder, one of its checkpoints, a model's folder or hub name; with an adapter, its base."""
    prompt: str = ""
    """To be given: what the model is asked, or the text to classify."""
    adapter: str | None = None
    """Folder of an adapter."""
    input: str = ""
    """Input of the instruction, if it has one; for a classifier the second text."""
    prompt_template: Literal["alpaca", "commonsense", "plain", "chat", "none"] | None = None
    """How the prompt is put to the model; none: as it is; null: as in its fine-tuning, if that is known."""
    max_new_tokens: int = 128
    """Longest answer (tokens)."""
    temperature: float = 0.0
    """Above 0: sampled at this temperature; 0: the likeliest token each time."""
    top_p: float = 1.0
    """Sampled from the likeliest tokens that together have this probability."""
    num_beams: int = 1
    """Beams searched, where nothing is sampled."""
    seed: int = 42
    """Seed of the sampling."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type of the weights; null: that of the files."""
    device: str | None = None
    """Where it runs, such as cpu or cuda; null: a GPU if there is one."""


def generate(config: GenerateConfig) -> str:
    """Load the model and let it answer.

    Returns:
        The answer without its prompt; of a classifier a line a class, with its probability.

    Raises:
        ConfigError: If an option is out of bounds, the model cannot be loaded or has no tokenizer.
    """
    if problems := _problems(config):
        raise ConfigError(" ".join(problems))
    device = device_named(config.device)
    loaded = load_trained(config.model, adapter=config.adapter, dtype=config.dtype)
    if loaded.tokenizer is None:
        raise ConfigError(f"there is no tokenizer beside {config.model}. Save one there: tokenizer.save_pretrained.")
    loaded.model.to(device)  # type: ignore[arg-type]
    if is_classifier(loaded.model):
        return classify(loaded, loaded.tokenizer, config.prompt, config.input)
    return answer(loaded, loaded.tokenizer, config)


@torch.no_grad()
def answer(loaded: Loaded, tokenizer: PreTrainedTokenizerFast, config: GenerateConfig) -> str:
    """What a language model writes after the prompt, put to it by the template."""
    template = config.prompt_template or loaded.prompt_template or "none"
    prompt = config.prompt
    if template != "none":
        prompt = render_prompt(template, config.prompt, config.input, tokenizer=tokenizer)
    elif config.input:
        raise ConfigError("input has no place in a bare prompt. Choose a prompt_template, or put it into the prompt.")
    is_chat = template == CHAT  # its template writes the special tokens itself
    tokens = tokenizer(prompt, add_special_tokens=not is_chat)["input_ids"]
    if tokens[-1:] == [tokenizer.eos_token_id] and not is_chat:
        tokens = tokens[:-1]  # some tokenizers end every text
    ends = {tokenizer.eos_token_id, *([end_of_turn(tokenizer)] if is_chat else [])} - {None}
    inputs = torch.tensor([tokens], device=loaded.model.device)
    sampled = {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0} if config.temperature else {}
    torch.manual_seed(config.seed)
    forget_generation(loaded.model, tokenizer)
    network: Any = loaded.model
    output = network.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=config.max_new_tokens,
        do_sample=bool(sampled),
        num_beams=config.num_beams,
        use_cache=True,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
        **sampled,
    )
    return str(tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)).strip()


@torch.no_grad()
def classify(loaded: Loaded, tokenizer: PreTrainedTokenizerFast, text: str, pair: str) -> str:
    """The probability of each class of a text or a pair of texts, the likeliest first; of a regression its score."""
    tokens = tokenizer(text, pair or None, return_tensors="pt", truncation=True).to(loaded.model.device)
    logits = loaded.model(**tokens).logits[0].float().cpu()
    names: Any = loaded.model.config.id2label
    if len(logits) == 1:
        return f"{names[0]} {logits.item():.3f}"
    found = logits.softmax(0)
    return "\n".join(f"{names[int(place)]} {found[place]:.4f}" for place in found.argsort(descending=True))


def _problems(config: GenerateConfig) -> list[str]:
    """What is out of bounds, one sentence each."""
    problems = [f"{name} must be given." for name in ("model", "prompt") if not getattr(config, name)]
    for name, least in (("max_new_tokens", 1), ("num_beams", 1), ("temperature", 0.0), ("seed", 0)):
        value = getattr(config, name)
        if not value >= least:
            problems.append(f"{name} must be at least {least}, got {value!r}.")
    if not 0.0 < config.top_p <= 1.0:
        problems.append(f"top_p must be above 0 and at most 1, got {config.top_p!r}.")
    if config.temperature > 0.0 and config.num_beams > 1:
        problems.append("temperature samples and num_beams searches. Set one of them.")
    return problems
