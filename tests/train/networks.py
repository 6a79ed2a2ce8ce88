"""The networks of the pre-training recipes on the meta device: shapes without storage."""

from __future__ import annotations

from functools import cache

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from fullrank.train.config import RunConfig
from fullrank.train.model import PAPER_SIZES

T5_VOCABULARY = 32100
"""Tokens of the T5 tokenizer, its 100 sentinels included; the authors' models have 32000 rows."""


@cache
def meta_model(size: str, vocabulary: int) -> LlamaForCausalLM:
    """The bfloat16 LLaMA of a paper, without storage."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **PAPER_SIZES[size]._asdict()))
    return model.to(torch.bfloat16)


@cache
def meta_pythia() -> GPTNeoXForCausalLM:
    """EleutherAI/pythia-1b in bfloat16, without storage."""
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=50304,
                hidden_size=2048,
                intermediate_size=8192,
                num_hidden_layers=16,
                num_attention_heads=8,
            )
        )
    return model.to(torch.bfloat16)


def model_of(config: RunConfig) -> LlamaForCausalLM | GPTNeoXForCausalLM:
    if config.model.name == "EleutherAI/pythia-1b":
        return meta_pythia()
    vocabulary = T5_VOCABULARY if config.data.tokenizer == "t5-base" else config.data.vocab_size
    return meta_model(config.model.name, vocabulary)
