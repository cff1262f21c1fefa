from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from zoo import create
from zoo.create import create_model
from zoo.errors import CheckpointError, UnknownName
from zoo.registry import list_models, load_object, model_card
from zoo.weights import cards
from zoo.weights.cards import is_non_commercial, list_cards, read_card, weight_card
from zoo.weights.checkpoint import save_tensors

WHOLE = "models: [a/b]\nfile: w.npz\nlicence: MIT\nformat: npz\n"


@pytest.mark.parametrize("name", list_cards())
def test_every_shipped_card_belongs_to_its_models(name: str) -> None:
    card = weight_card(name)
    assert card.models
    for model in card.models:
        assert name in model_card(model).weights
    if card.converter:
        assert callable(load_object(card.converter))


@pytest.mark.parametrize("name", list_cards())
def test_every_shipped_card_says_what_the_file_is(name: str) -> None:
    card = weight_card(name)
    assert card.licence
    assert card.format
    assert card.sha256 is None or (len(card.sha256) == 64 and int(card.sha256, 16) >= 0)


def test_every_card_that_a_model_names_is_shipped() -> None:
    for model in list_models():
        assert set(model_card(model).weights) <= set(list_cards())


def test_an_unknown_card_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"no checkpoint card 'gpt-2'\. Did you mean 'gpt2'"):
        weight_card("gpt-2")


def test_a_file_lies_in_the_cache_under_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    assert weight_card("gpt2").path == tmp_path / "weights" / "gpt2" / "model.safetensors"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (WHOLE + "url: http://x\nsha265: 00\n", r"unknown key 'sha265'\. Did you mean 'sha256'"),
        ("models: [a/b]\nurl: http://x\n", "missing.*'file', 'licence', and 'format'"),
        (WHOLE, "give either url or hub"),
        (WHOLE + "url: http://x\nhub: x/y\n", "give either url or hub"),
    ],
)
def test_a_bad_card_names_its_fault(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=rf"bad\.yaml: .*{message}"):
        read_card(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    "licence", ["S-Lab License 1.0 (non-commercial)", "CC-BY-NC 4.0", "CC BY-NC-SA 4.0", "cc_by_nc"]
)
def test_non_commercial_licences_are_recognised(licence: str) -> None:
    assert is_non_commercial(licence)


@pytest.mark.parametrize("licence", ["MIT", "Apache-2.0", "BSD-3-Clause", "CC-BY 4.0", "none stated"])
def test_commercial_licences_are_not_flagged(licence: str) -> None:
    assert not is_non_commercial(licence)


def test_cards_are_found_in_the_shipped_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text(WHOLE + "url: http://x/w.npz\n")
    monkeypatch.setattr(cards, "cards_dir", lambda: tmp_path)
    assert list_cards() == ["mine"]
    assert weight_card("mine").address == "http://x/w.npz"


def test_gpt2_starts_st_llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPT-2 of width 24 in the layout of the hub stands in for the real file."""
    width = 24
    gpt2 = {
        "wte.weight": (50, width),
        "wpe.weight": (16, width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }
    for i in range(2):
        layers = {"attn.c_attn": 3 * width, "attn.c_proj": width, "mlp.c_fc": 4 * width, "mlp.c_proj": width}
        for layer, outputs in layers.items():
            inputs = 4 * width if layer == "mlp.c_proj" else width
            gpt2 |= {f"h.{i}.{layer}.weight": (inputs, outputs), f"h.{i}.{layer}.bias": (outputs,)}
        norms = [f"h.{i}.ln_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")]
        gpt2 |= dict.fromkeys(norms, (width,)) | {f"h.{i}.attn.bias": (1, 1, 16, 16)}
    file = tmp_path / "gpt2" / "model.safetensors"
    tensors = {name: torch.randn(shape) for name, shape in gpt2.items()}
    save_tensors(tensors, file)
    card = dataclasses.replace(weight_card("gpt2"), sha256=None, size=None)
    monkeypatch.setattr(create, "weight_card", lambda name: card)
    monkeypatch.setenv("ZOO_MIRROR", str(tmp_path))
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))

    sizes = {"num_nodes": 5, "width": width, "num_heads": 2, "max_positions": 16, "llm_layers": 1}
    state = create_model("st_llm", pretrained=True, **sizes).state_dict()

    def is_there(tensor: torch.Tensor) -> bool:
        return any(tensor.shape == own.shape and torch.equal(tensor, own) for own in state.values())

    for name in ("wpe.weight", "ln_f.weight", "h.0.ln_1.bias", "h.0.attn.c_attn.bias"):
        assert is_there(tensors[name]), name
    for name in (
        "h.0.attn.c_attn.weight",
        "h.0.attn.c_proj.weight",
        "h.0.mlp.c_fc.weight",
        "h.0.mlp.c_proj.weight",
    ):
        assert is_there(tensors[name].T), name
    assert not is_there(tensors["h.1.mlp.c_fc.bias"])
