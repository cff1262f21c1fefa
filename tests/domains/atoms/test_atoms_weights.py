"""Official checkpoints of potentials: files of fairchem, state dicts, names of models."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from allscaip_small import PLAIN, SIZES, batch_of, frames, small_allscaip
from ase.build import molecule
from omegaconf import OmegaConf
from torch import Tensor, nn

import zoo
from domains.atoms.models.allscaip import AllScAIP
from domains.atoms.models.potential import Potential
from domains.atoms.weights.pickled import PARTS
from zoo.errors import CheckpointError, ConfigError
from zoo.weights.checkpoint import load_model, read_state_dict, save_model, save_state_dict
from zoo.weights.exchange import detect_model, load_weights
from zoo.weights.formats import FAIRCHEM

BACKBONE: dict[str, Any] = {
    "model": "fairchem.core.models.allscaip.AllScAIP.AllScAIPBackbone",
    "num_layers": 2,
    "hidden_size": 16,
    "atten_num_heads": 2,
    "max_radius": 4.0,
    "knn_k": 8,
    "knn_pad_size": 50,
    "edge_distance_expansion_size": 12,
    "edge_direction_expansion_size": 3,
    "node_direction_expansion_size": 4,
    "use_freq_mask": True,
    "freequency_list": [3, 2, 2, 1],
    "use_sincx_mask": True,
    "attn_num_freq": 6,
    "use_padding": True,
    "use_compile": True,
    "max_atoms": 350,
    "an_option_of_tomorrow": 1,
}
OPTIONS = {
    name: value for name, value in BACKBONE.items() if name not in ("an_option_of_tomorrow", "use_padding")
}
REFERENCES = [0.0, -13.6, 0.5, -200.0, 0.0, 0.0, -1030.0, -1480.0, -2040.0]


def tasks(**changes: Any) -> list[dict[str, Any]]:
    """As in the published configurations; energies with a mean."""
    normaliser = "fairchem.core.modules.normalization.normalizer.Normalizer"
    energy = {
        "_target_": "fairchem.core.units.mlip_unit.mlip_unit.Task",
        "name": "omol_energy",
        "property": "energy",
        "datasets": ["omol"],
        "normalizer": {"_target_": normaliser, "mean": 0.25, "rmsd": 1.5},
        "element_references": {
            "_target_": "fairchem.core.modules.normalization.element_references.ElementReferences",
            "element_references": {"_target_": "torch.DoubleTensor", "_args_": [REFERENCES]},
        },
    }
    forces = {
        "name": "omol_forces",
        "property": "forces",
        "datasets": ["omol"],
        "normalizer": {"_target_": normaliser, "mean": 0.0, "rmsd": np.float64(1.5)},
    }
    return [energy | changes, forces]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> type:
    """fairchem's class under its own name, while files are written and read."""
    module, _, name = FAIRCHEM.rpartition(".")
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        path = ".".join(parts[:count])
        monkeypatch.setitem(sys.modules, path, ModuleType(path))
    cls = dataclasses.make_dataclass(name, PARTS)
    cls.__module__ = module
    setattr(sys.modules[module], name, cls)
    return cls


Writer = Callable[..., Path]


@pytest.fixture
def write(program: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Writer:
    """Writes a checkpoint of a model as fairchem does; nothing of fairchem is left when it is read."""

    def written(model: nn.Module, **changes: Any) -> Path:
        weights = zoo.to_official(model)
        content = {
            "model_config": {"backbone": BACKBONE, "heads": {}},
            "model_state_dict": {name: value + 1 for name, value in weights.items()},
            "ema_state_dict": {f"module.{name}": value for name, value in weights.items()}
            | {"n_averaged": torch.tensor(7)},
            "tasks_config": tasks(),
        }
        path = tmp_path / "inference.pt"
        torch.save(program(**(content | changes)), path)
        for name in [name for name in sys.modules if name.split(".")[0] == "fairchem"]:
            monkeypatch.delitem(sys.modules, name)
        return path

    return written


def assert_same(found: nn.Module, expected: nn.Module, skip: str = "scale.") -> None:
    theirs = {name: value for name, value in expected.state_dict().items() if not name.startswith(skip)}
    ours = {name: value for name, value in found.state_dict().items() if not name.startswith(skip)}
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# ---- files of fairchem -------------------------------------------------------------------------------------


@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_an_inference_checkpoint_gives_averaged_weights_options_and_units(write: Writer, forces: str) -> None:
    source = small_allscaip(forces=forces)
    model = zoo.from_official("allscaip_md", write(source))
    assert isinstance(model, AllScAIP)
    assert_same(model, source)
    assert (model.cutoff, model.knn.k, model.sizes.frequency_list) == (4.0, 8, (3, 2, 2, 1))
    assert model.max_neighbours is None  # padding belongs to training
    batch = batch_of(molecule("CH3OH"))
    rough, exact = model(batch), model.evaluate(batch)
    expected = rough["energy"].double() * 1.5 + 0.25 + REFERENCES[6] + 4 * REFERENCES[1] + REFERENCES[8]
    torch.testing.assert_close(exact["energy"], expected)
    torch.testing.assert_close(exact["forces"], rough["forces"] * 1.5)
    assert model.scale.element_references.shape == (110,)
    assert float(model.scale.element_references[9:].abs().max()) == 0


def test_configs_may_be_nodes_of_omegaconf(write: Writer) -> None:
    source = small_allscaip()
    config = OmegaConf.create({"backbone": BACKBONE, "rate": "${backbone.max_radius}"})
    plain = [{**task, "normalizer": dict(task["normalizer"], rmsd=1.5)} for task in tasks()]
    model = zoo.from_official(
        "allscaip_md", write(source, model_config=config, tasks_config=OmegaConf.create(plain))
    )
    assert isinstance(model, AllScAIP)
    assert_same(model, source)
    assert float(model.scale.energy_rmsd) == 1.5


def test_last_weights_where_there_is_no_average(write: Writer) -> None:
    source = small_allscaip()
    model = zoo.from_official("allscaip_md", write(source, ema_state_dict={"n_averaged": torch.tensor(0)}))
    for name, value in zoo.to_official(source).items():
        torch.testing.assert_close(zoo.to_official(model)[name], value + 1)


def test_every_way_to_load_brings_the_units(write: Writer) -> None:
    source = small_allscaip()
    path = write(source)
    by_path = zoo.create_model("allscaip_md", checkpoint_path=path)
    filled = small_allscaip(num_layers=2)
    load_weights(filled, path)
    for model in (by_path, filled):
        assert isinstance(model, AllScAIP)
        assert_same(model, source)
        assert float(model.scale.energy_mean) == 0.25


def test_published_weights_load_from_a_mirror(
    write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = small_allscaip(forces="direct")
    card = zoo.weights.cards.weight_card("allscaip_md_direct_omol")
    place = tmp_path / "mirror" / card.name / card.file
    place.parent.mkdir(parents=True)
    write(source).rename(place)
    monkeypatch.setenv("ZOO_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    model = zoo.create_model("allscaip_md", pretrained=card.name)
    assert_same(model, source)


def test_units_survive_our_own_checkpoint(write: Writer, tmp_path: Path) -> None:
    model = zoo.from_official("allscaip_md", write(small_allscaip()))
    save_model(model, tmp_path / "own.safetensors")
    again, _ = load_model(tmp_path / "own.safetensors")
    assert_same(again, model, skip="nothing")
    assert zoo.to_official(again).keys() == zoo.to_official(model).keys()


class Evil:
    """Touches a file when a pickle makes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused_by_the_name_of_it(write: Writer, tmp_path: Path) -> None:
    path = write(small_allscaip(), tasks_config=[Evil(tmp_path / "touched")])
    with pytest.raises(CheckpointError, match=r"inference\.pt would run code .* names \S*mkdir"):
        zoo.from_official("allscaip_md", path)
    assert not (tmp_path / "touched").exists()


def test_a_type_that_is_only_mentioned_cannot_be_called(write: Writer) -> None:
    path = write(small_allscaip(), tasks_config=[_Made()])
    with pytest.raises(CheckpointError, match=r"makes an object of builtins\.str"):
        zoo.from_official("allscaip_md", path)


class _Made:
    def __reduce__(self) -> tuple[Any, ...]:
        return str, ("text",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema_state_dict": {}, "model_state_dict": {}}, "holds no weights"),
        ({"ema_state_dict": {"backbone.x": 3}}, "backbone.x is a int, not a tensor"),
        ({"tasks_config": [*tasks(), {"datasets": ["oc20"]}]}, r"several data sets \(oc20, omol\)"),
        (
            {"tasks_config": [{"property": "forces", "normalizer": {"mean": 1.0, "rmsd": 1.0}}]},
            r"the mean of forces is 1\.0, not 0",
        ),
    ],
)
def test_a_file_that_cannot_be_used_says_why(write: Writer, changes: dict[str, Any], message: str) -> None:
    path = write(small_allscaip(), **changes)
    with pytest.raises(CheckpointError, match=message):
        zoo.from_official("allscaip_md", path)


def test_a_file_without_its_parts_says_which(program: type, tmp_path: Path) -> None:
    record = program(*[{}] * len(PARTS))
    del record.tasks_config
    torch.save(record, tmp_path / "half.pt")
    with pytest.raises(CheckpointError, match="lacks tasks_config"):
        zoo.from_official("allscaip_md", tmp_path / "half.pt")


def test_escaip_files_of_the_same_format_load_too(write: Writer) -> None:
    options = {
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "frequency_list": [3, 2, 2, 1],
        "cutoff": 4.0,
    }
    torch.manual_seed(0)
    source = zoo.create_model("escaip_h512l10", forces="conservative", **options)
    backbone = {"atten_num_heads": 2, "max_radius": 4.0, "freequency_list": [3, 2, 2, 1], "tomorrow": 1}
    model = zoo.from_official("escaip_h512l10", write(source, model_config={"backbone": backbone}))
    assert isinstance(model, Potential)
    assert_same(model, source)
    assert model.cutoff == 4.0
    assert float(model.scale.force_rmsd) == 1.5


# ---- state dicts -------------------------------------------------------------------------------------------

KINDS: list[dict[str, Any]] = [
    {},
    {"forces": "direct"},
    {**PLAIN, "normalization": "layernorm"},
    {"use_node_path": False, "ffn_multiplier": 0, "output_multiplier": 0},
    {"forces": "direct", "head_names": ["total", "push.head"]},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: ",".join(kind) or "default")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_there_and_back_keeps_every_key_and_value(kind: dict[str, Any], suffix: str, tmp_path: Path) -> None:
    source = small_allscaip(**kind)
    official = zoo.to_official(source)
    save_state_dict({f"module.{name}": value for name, value in official.items()}, tmp_path / f"w{suffix}")
    given = OPTIONS | {"use_freq_mask": source.sizes.frequency_list is not None}
    given.pop("use_sincx_mask")
    given.pop("attn_num_freq")
    model = zoo.from_official("allscaip_md", tmp_path / f"w{suffix}", **given)
    assert_same(model, source)
    back = zoo.to_official(model)
    assert back.keys() == official.keys()
    torch.testing.assert_close(back, official, rtol=0, atol=0)
    with torch.no_grad():
        batch = batch_of(*frames())
        torch.testing.assert_close(model(batch), source(batch), equal_nan=True)


def test_official_names_are_those_of_the_program() -> None:
    conservative, direct = (zoo.to_official(small_allscaip(forces=f)) for f in ("conservative", "direct"))
    assert "output_heads.energyandforcehead.head.energy_ffn.1.0.weight" in conservative
    assert {
        "output_heads.oc20_energy.node_norm.weight",
        "output_heads.forces.force_ffn.0.0.bias",
    } <= direct.keys()
    block = "backbone.transformer_blocks.1"
    assert {
        f"{block}.neighborhood_attention.dst_attn.attn_in_proj_k.bias",
        f"{block}.neighborhood_attention.src_attn_norm.weight",
        f"{block}.node_attention.node_attn_res_scale",
        f"{block}.edge_ffn.ffn.0.0.weight",
        "backbone.input_block.charge_embedding.rand_emb.weight",
    } <= direct.keys()


def test_heads_of_other_names_fill_a_model() -> None:
    source = small_allscaip(forces="direct", head_names=["total", "push"])
    model = small_allscaip(forces="direct")
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    load_weights(model, zoo.to_official(source))
    assert_same(model, source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 32}, "hidden_size=16, not 32"),
        ({"use_sincx_mask": False}, "num_frequencies=6, not None"),
        ({"direct_forces": True}, "forces='conservative', not 'direct'"),
    ],
)
def test_an_option_that_is_not_the_files_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        zoo.from_official("allscaip_md", zoo.to_official(small_allscaip()), **(OPTIONS | options))


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no option 'max_radios'\. Did you mean 'max_radius'"):
        zoo.from_official("allscaip_md", zoo.to_official(small_allscaip()), max_radios=4.0)


def test_a_second_head_for_energies_is_refused() -> None:
    state = zoo.to_official(small_allscaip())
    old = "output_heads.energyandforcehead.head."
    more = {n.replace(old, "output_heads.oc20."): v for n, v in state.items() if n.startswith(old)}
    with pytest.raises(CheckpointError, match=r"2 heads for energies \(energyandforcehead\.head, oc20\)"):
        zoo.from_official("allscaip_md", state | more, **OPTIONS)


def test_missing_and_unknown_tensors_are_named_officially() -> None:
    state = zoo.to_official(small_allscaip())
    del state["backbone.input_block.node_linear.0.bias"]
    with pytest.raises(CheckpointError, match=r"missing \(1\): backbone\.input_block\.node_linear\.0\.bias"):
        zoo.from_official("allscaip_md", state, **OPTIONS)


# ---- which model a file is of ------------------------------------------------------------------------------


def shapes(name: str, **options: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        return zoo.to_official(zoo.create_model(name, **options))


@pytest.mark.parametrize("forces", ["direct", "conservative"])
@pytest.mark.parametrize(
    "name", ["allscaip_md", "allscaip_sm", "escaip_h512l10", "escaip_h640l6", "escaip_h1024l8"]
)
def test_the_tensors_tell_their_model(name: str, forces: str) -> None:
    assert detect_model(shapes(name, forces=forces)) == name


def test_a_file_of_fairchem_tells_its_model(write: Writer) -> None:
    source = zoo.create_model("allscaip_mini")
    assert detect_model(read_state_dict(write(source))) == "allscaip_mini"


def test_sizes_of_no_model_and_other_architectures_tell_nothing() -> None:
    assert detect_model(zoo.to_official(small_allscaip())) is None
    assert detect_model({"backbone.input_block.atomic_embedding.weight": torch.zeros(2, 2)}) is None


FIRST_VERSION = [
    "backbone.transformer_blocks.0.graph_attention.multi_head_attention.in_proj_weight",
    "backbone.transformer_blocks.0.graph_attention.edge_linear.0.weight",
    "backbone.readout_layers.0.energy_norm.weight",
]


DIFFERENCE = "first version of EScAIP.*multi_head_attention instead of attn_in_proj_q.*edge_linear instead of"


def test_the_first_version_of_escaip_is_refused_with_the_keys_that_differ() -> None:
    state = {name: torch.zeros(1) for name in FIRST_VERSION}
    with pytest.raises(CheckpointError, match=DIFFERENCE):
        zoo.from_official("escaip_h512l10", state)


def test_the_first_version_is_told_from_other_files() -> None:
    with pytest.raises(CheckpointError, match=DIFFERENCE):
        detect_model({name: torch.zeros(1) for name in FIRST_VERSION})


def test_small_sizes_are_those_of_the_options() -> None:
    """The names on both sides of the files above say the same."""
    model = zoo.from_official("allscaip_md", zoo.to_official(small_allscaip()), **OPTIONS)
    built: Any = model.__dict__["zoo_config"]["config"]
    assert {name: built[name] for name in SIZES} == SIZES
