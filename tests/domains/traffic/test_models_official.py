"""Official layouts: there and back, and the language models inside against the transformers library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import zoo
from zoo.errors import CheckpointError, ConfigError

OFFICIAL = {
    "gman": {"N": 5, "P": 3, "Q": 2, "T": 24, "L": 2, "K": 2, "d": 3},
    "gman no norm": {"N": 5, "P": 3, "Q": 2, "T": 24, "K": 3, "d": 2, "bn": False, "which": "METR"},
    "gman_port": {"N": 5, "K": 3, "d": 3, "num_his": 3, "num_pred": 2, "mask": True, "bn_decay": 0.2},
    "st_llm": {"num_nodes": 5, "slots_per_day": 24, "llm_layer": 2, "U": 1, "gpt2": "n_embd 12, n_head 2"},
}
OURS = {
    "gman": {"num_nodes": 5, "history": 3, "horizon": 2, "steps_per_day": 24, "num_layers": 2}
    | {"num_heads": 2, "head_dim": 3},
    "gman no norm": {"num_nodes": 5, "history": 3, "horizon": 2, "steps_per_day": 24, "norm": False}
    | {"num_heads": 3, "head_dim": 2, "causal": True, "dropout": 0.1},
    "gman_port": {"num_nodes": 5, "num_heads": 3, "head_dim": 3, "history": 3, "horizon": 2}
    | {"causal": True, "norm_momentum": 0.2},
    "st_llm": {"num_nodes": 5, "steps_per_day": 24, "llm_layers": 2, "width": 12, "num_heads": 2},
}


@pytest.mark.parametrize("case", OFFICIAL)
def test_official_weights_come_back_bit_equal(case: str) -> None:
    name = case.split()[0]
    model = zoo.create_model(name, **OURS[case])
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor)
    official = zoo.to_official(model)
    loaded = zoo.from_official(name, official, **OFFICIAL[case])
    back = zoo.to_official(loaded)
    assert back.keys() == official.keys()
    assert all(torch.equal(back[key], official[key]) for key in official)
    config = loaded.zoo_config["config"]
    assert all(config[key] == pytest.approx(value) for key, value in OURS[case].items())


def test_optimizer_slots_of_tensorflow_are_ignored_and_other_leftovers_are_not() -> None:
    official = zoo.to_official(zoo.create_model("gman", **OURS["gman"]))
    slots = {"kernel/Adam": official["kernel"], "beta1_power": torch.tensor(0.9), "Variable": torch.tensor(7)}
    zoo.from_official("gman", official | slots, **OFFICIAL["gman"])
    with pytest.raises(CheckpointError, match="kernel_999"):
        zoo.from_official("gman", official | {"kernel_999": torch.zeros(1, 1, 2, 2)}, **OFFICIAL["gman"])
    with pytest.raises(ConfigError, match="temporal_mask"):
        zoo.from_official("gman", official, **OFFICIAL["gman"], temporal_maks=True)


@pytest.mark.parametrize("option", [{"spatial_groups": 2}, {"from_last": True}])
def test_what_no_official_program_has_no_official_layout_holds(option: dict) -> None:
    model = zoo.create_model("gman", **OURS["gman"], **option)
    with pytest.raises(CheckpointError, match=next(iter(option))):
        zoo.to_official(model)


def test_st_llm_takes_a_checkpoint_with_token_table_and_without_attention_bias() -> None:
    official = zoo.to_official(zoo.create_model("st_llm", **OURS["st_llm"]))
    official["gpt.gpt2.wte.weight"] = torch.zeros(9, 12)
    official["gpt.gpt2.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    official = {key: value for key, value in official.items() if not key.endswith("c_attn.bias")}
    model = zoo.from_official("st_llm", official, **OFFICIAL["st_llm"])
    assert model.get_parameter("gpt2.blocks.0.qkv.bias").count_nonzero() == 0


def test_gpt2_part_equals_the_transformers_library(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=12, n_head=2, n_layer=3, n_positions=16, vocab_size=9)
    theirs = transformers.GPT2Model(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = zoo.create_model("st_llm", **(OURS["st_llm"] | {"llm_layers": 3, "max_positions": 16})).eval()
    ours.load_backbone(tmp_path / "model.safetensors")
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours.gpt2(x), theirs(inputs_embeds=x).last_hidden_state, atol=1e-5, rtol=1e-5)


LINK = {"num_nodes": 6, "width": 24, "num_heads": 4, "num_layers": 2, "hidden": 40, "num_eigenvectors": 3}


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_st_link_with_plain_rotation_and_empty_memory_is_a_llama(num_kv_heads: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        num_hidden_layers=2,
        intermediate_size=40,
        vocab_size=9,
        rms_norm_eps=1e-6,
    )
    theirs = transformers.LlamaModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = zoo.create_model(
        "st_link", **LINK, num_kv_heads=num_kv_heads, position_pairs=3, causal=True
    ).eval()
    ours.load_backbone(tmp_path)
    x = torch.randn(2, 6, 24)
    expected = theirs(inputs_embeds=x).last_hidden_state
    torch.testing.assert_close(ours.llama(x, ours.eigenvectors, True), expected, atol=1e-5, rtol=1e-5)


def test_st_link_without_order_is_equivariant_to_sensors() -> None:
    model = zoo.create_model("st_link", **LINK, position_pairs=0).eval()
    torch.nn.init.normal_(model.eigenvectors)
    x, order = torch.randn(2, 6, 24), torch.randperm(6)
    expected = model.llama(x, model.eigenvectors, False)[:, order]
    permuted = model.llama(x[:, order], model.eigenvectors[order], False)
    torch.testing.assert_close(permuted, expected, atol=1e-5, rtol=1e-5)


def test_gradients_reach_angles_and_memory_of_st_link() -> None:
    model = zoo.create_model("st_link", **LINK)
    torch.nn.init.normal_(model.eigenvectors)
    memory = model.llama.blocks[0].memory
    torch.nn.init.normal_(memory.values)
    model.llama(torch.randn(2, 6, 24), model.eigenvectors, False).square().sum().backward()
    for parameter in (model.llama.blocks[0].attention.spatial, memory.keys, memory.values):
        assert parameter.grad.count_nonzero() > 0
