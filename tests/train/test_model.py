"""Models by paper size, from a folder, and from weights; what cannot work is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fullrank.errors import ConfigError
from fullrank.train.config import ModelConfig
from fullrank.train.model import PAPER_SIZES, build_model

VOCABULARY = 96
PARAMETERS_AT_32000 = {
    "llama-9m": 9.0,
    "llama-20m": 19.5,
    "llama-35m": 35.2,
    "llama-40m": 42.4,
    "llama-60m": 58.1,
    "llama-71m": 70.6,
    "llama-100m": 100.0,
    "llama-130m": 134.1,
    "llama-250m": 247.4,
    "llama-350m": 368.0,
    "llama-1b": 1339.1,
    "llama-3b": 2685.8,
    "llama-7b": 6738.4,
}
"""Parameters in millions with the authors' vocabulary of 32000."""


def build(config: ModelConfig, **changes: int | None) -> PreTrainedModel:
    arguments: dict[str, int | None] = {
        "vocab_size": VOCABULARY,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "sequence_length": 32,
        "seed": 0,
    }
    return build_model(config, **(arguments | changes))


def tiny(**changes: object) -> ModelConfig:
    return ModelConfig(**({"name": "llama-9m", "overrides": {"num_hidden_layers": 1}} | changes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small trained model; 64 positions."""
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=100,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("models") / "llama-mine"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters()}


def same(one: PreTrainedModel, two: PreTrainedModel) -> bool:
    others = weights(two)
    return all(torch.equal(weight, others[name]) for name, weight in weights(one).items())


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_paper_size_has_its_parameters(name: str) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **PAPER_SIZES[name]._asdict()))
    assert round(model.num_parameters() / 1e6, 1) == PARAMETERS_AT_32000[name]


def test_fresh_model_fits_tokenizer_and_trains() -> None:
    model = build(tiny())
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.num_attention_heads) == (128, 352, 4)
    assert (config.vocab_size, config.rms_norm_eps, config.max_position_embeddings) == (VOCABULARY, 1e-6, 1024)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2)
    assert config.use_cache is False
    assert config.num_hidden_layers == 1
    assert model.training
    ids = torch.arange(32).reshape(1, -1)
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(torch.tensor(96.0).log().item(), abs=0.3)


def test_fresh_weights_follow_the_seed_and_leave_the_random_state_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    one = build(tiny(), seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert same(one, build(tiny(), seed=1))
    assert not same(one, build(tiny(), seed=2))


def test_bfloat16_starts_where_float32_does() -> None:
    full, half = build(tiny()), build(tiny(dtype="bfloat16"))
    halves = weights(half)
    assert all(torch.equal(weight.bfloat16(), halves[name]) for name, weight in weights(full).items())
    assert {weight.dtype for weight in halves.values()} == {torch.bfloat16}
    assert half.config.dtype == torch.bfloat16
    assert {buffer.dtype for buffer in half.buffers()} == {torch.float32}  # the rotary tables


def test_end_token_that_also_pads_is_still_learned() -> None:
    model = build(tiny(), pad_token_id=1)
    assert model.config.pad_token_id is None
    ids = torch.tensor([[5, 1, 7, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad[1].norm() > 0


def test_overrides_reach_what_is_derived_from_them() -> None:
    config = build(tiny(overrides={"num_hidden_layers": 1, "num_attention_heads": 2})).config
    assert (config.head_dim, config.num_key_value_heads) == (64, 2)
    assert build(tiny(overrides={"num_hidden_layers": 1, "vocab_size": 128})).config.vocab_size == 128


def test_fresh_model_grows_to_the_sequence_length(saved: Path) -> None:
    assert build(tiny(), sequence_length=3000).config.max_position_embeddings == 3000
    assert build(ModelConfig(name=str(saved)), sequence_length=80).config.max_position_embeddings == 80


def test_folder_gives_the_shape_or_the_weights(saved: Path) -> None:
    original = LlamaForCausalLM.from_pretrained(saved)
    loaded = build(ModelConfig(name=str(saved), pretrained=True))
    assert same(original, loaded)
    assert loaded.config.use_cache is False
    assert loaded.config.vocab_size == 100
    fresh = build(ModelConfig(name=str(saved), overrides={"num_hidden_layers": 3}))
    assert (fresh.config.hidden_size, fresh.config.num_hidden_layers) == (32, 3)
    assert fresh.config.vocab_size == VOCABULARY
    half = build(ModelConfig(name=str(saved), pretrained=True, dtype="bfloat16"))
    assert {weight.dtype for weight in weights(half).values()} == {torch.bfloat16}


def refuses(config: ModelConfig, match: str, **changes: int | None) -> None:
    with pytest.raises(ConfigError, match=match):
        build(config, **changes)


def test_unknown_name_lists_the_sizes() -> None:
    refuses(ModelConfig(name="llama-65m"), r"'llama-65m'.*Did you mean llama-60m\? Sizes.* llama-9m, .*llama-7b")


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuses(ModelConfig(name="nobody/nothing"), r"'nobody/nothing' is not a size.*name a local folder")


def test_paper_size_has_no_weights() -> None:
    refuses(ModelConfig(name="llama-60m", pretrained=True), r"llama-60m is a size of the papers.*pretrained to false")


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"num_layers": 2}, r"'num_layers', .*Did you mean num_hidden_layers\?"),
        ({"qqq": 2}, r"'qqq', .*Its fields: .*hidden_size"),
        ({"hidden_size": "wide"}, r"do not fit llama-9m: .*expected int, got str"),
        ({"hidden_size": -4}, r"cannot build llama-9m with"),
        ({"hidden_size": 129}, r"do not fit llama-9m: .*not a multiple"),
        ({"vocab_size": 50}, r"the tokenizer has 96 tokens, more than the 50 rows"),
        ({"max_position_embeddings": 16}, r"data\.sequence_length must be at most 16 .* got 32"),
        ({"use_cache": True}, r"cannot set use_cache.*always off"),
        ({"dtype": "float32"}, r"cannot set dtype\. Set model\.dtype"),
        ({"eos_token_id": 3}, r"cannot set eos_token_id.*data\.tokenizer"),
    ],
)
def test_impossible_overrides(overrides: dict[str, object], match: str) -> None:
    refuses(ModelConfig(name="llama-9m", overrides=overrides), match)


def test_unknown_attention() -> None:
    refuses(tiny(attn_implementation="fast"), r"model\.attn_implementation fast: ")


def test_pretrained_weights_must_fit(saved: Path, tmp_path: Path) -> None:
    pretrained = ModelConfig(name=str(saved), pretrained=True)
    refuses(pretrained, r"the tokenizer has 101 tokens, more than the 100 rows", vocab_size=101)
    refuses(pretrained, r"data\.sequence_length must be at most 64 .* got 65", sequence_length=65)

    def changed(**overrides: int) -> ModelConfig:
        return ModelConfig(name=str(saved), pretrained=True, overrides=overrides)

    refuses(changed(num_hidden_layers=3), r"lack 9 weights of the model, first model\.layers\.2\.")
    refuses(changed(intermediate_size=48), r"do not have the shapes .*'intermediate_size': 48")
    bare = tmp_path / "bare"
    LlamaConfig(vocab_size=100).save_pretrained(bare)
    refuses(ModelConfig(name=str(bare), pretrained=True), r"no weights in safetensors files.*pretrained to false")


def test_pickled_weights_are_refused(saved: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(saved)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    refuses(ModelConfig(name=str(tmp_path), pretrained=True), r"no weights in safetensors files")
