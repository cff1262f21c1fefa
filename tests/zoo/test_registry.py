from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from zoo import create, registry
from zoo.create import create_model
from zoo.errors import CheckpointError, ConfigError, UnknownName
from zoo.registry import (
    Domain,
    argument_docs,
    count_flops,
    get_domain,
    list_domains,
    list_models,
    model_card,
    model_signature,
    register_model,
)
from zoo.weights import cards
from zoo.weights.checkpoint import save_model, save_state_dict
from zoo.weights.exchange import from_official, to_official

ROOT = Path(__file__).resolve().parents[2]


# ---- domains -----------------------------------------------------------------------------------------------


@pytest.fixture
def zebra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A domain package `domains.zebra` with one model, not imported yet."""
    import domains

    list_models()
    package = tmp_path / "zebra"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from torch import nn\n"
        "from zoo.registry import Domain, register_domain, register_model\n"
        "register_domain(Domain('zebra', 'stripes', task='json:loads', data='json:dumps'))\n"
        "@register_model(model=nn.Linear, summary='', paper='', licence='MIT', source='none',"
        " status='re-implementation')\n"
        "def zebra_net(**kwargs):\n    return nn.Linear(**kwargs)\n"
    )
    monkeypatch.setattr(domains, "__path__", [*domains.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    monkeypatch.setattr(registry, "_DOMAINS", dict(registry._DOMAINS))
    monkeypatch.delitem(sys.modules, "domains.zebra", raising=False)
    return "zebra"


def test_a_domain_is_found_without_importing_it(zebra: str) -> None:
    assert zebra in list_domains()
    assert "domains.zebra" not in sys.modules


def test_a_qualified_name_imports_only_its_domain() -> None:
    program = (
        "import sys, zoo; names = zoo.list_models('traffic/*');"
        "print(len(names), sorted(m for m in sys.modules if m.startswith('domains.') and m.count('.') == 1))"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    count, modules = out.stdout.split(maxsplit=1)
    assert int(count) > 0
    assert modules.strip() == "['domains.traffic']"


def test_a_model_is_found_by_bare_and_by_qualified_name(zebra: str) -> None:
    assert list_models("zebra/*") == ["zebra_net"]
    assert create_model("zebra/zebra_net", in_features=2, out_features=3).weight.shape == (3, 2)
    assert create_model("zebra_net", in_features=2, out_features=3).weight.shape == (3, 2)


def test_a_domain_loads_its_parts_by_name(zebra: str) -> None:
    assert get_domain("zebra").load("task") is json.loads
    with pytest.raises(ConfigError, match="Domain 'zebra' has no predict"):
        get_domain("zebra").load("predict")


def test_a_model_for_another_problem_of_its_domain_has_data_and_task_of_its_own(zebra: str) -> None:
    get_domain(zebra)
    registry.register_domain(Domain("zebra/gait", "how they walk", task="pathlib:Path"))
    registry._MODELS["trotter"] = dataclasses.replace(
        registry._MODELS["zebra_net"], card=dataclasses.replace(model_card("zebra_net"), problem="gait")
    )
    assert get_domain("zebra", "trotter").load("task") is Path
    assert get_domain("zebra", "trotter") is get_domain("zebra/gait")
    assert get_domain("zebra/gait", "zebra_net") is get_domain("zebra", "gman") is get_domain("zebra")
    assert "zebra/gait" not in list_domains()
    with pytest.raises(UnknownName, match="registers no domain 'zebra/canter'"):
        get_domain("zebra/canter")


def test_an_unknown_domain_names_the_nearest(zebra: str) -> None:
    with pytest.raises(UnknownName, match=r"no domain 'zebr'. Did you mean 'zebra'"):
        get_domain("zebr")
    with pytest.raises(UnknownName, match=r"no domain 'trafic'. Did you mean 'traffic'"):
        create_model("trafic/gman")


# ---- models ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("toys")
class TestModels:
    def test_list_filters_by_domain_and_name(self) -> None:
        assert list_models("toys/*") == ["toy_deep", "toy_net"]
        assert list_models("*_deep") == ["toy_deep"]
        assert "toy_net" not in list_models("traffic/*")

    @pytest.mark.parametrize(("wrong", "right"), [("toynet", "toy_net"), ("Toy-Net", "toy_net")])
    def test_an_unknown_model_names_the_nearest(self, wrong: str, right: str) -> None:
        with pytest.raises(UnknownName, match=rf"no model '{wrong}'. Did you mean .*'{right}'"):
            create_model(wrong)

    def test_a_model_of_another_domain_is_not_found_under_this_one(self) -> None:
        with pytest.raises(UnknownName, match="no model 'toy_net' in domain 'traffic'"):
            create_model("traffic/toy_net", width=2)

    def test_an_unknown_argument_names_the_nearest_and_all(self) -> None:
        with pytest.raises(ConfigError, match=r"no argument 'widht'. Did you mean 'width'\?.*depth, heads"):
            create_model("toy_net", widht=3)

    def test_a_missing_argument_is_named(self) -> None:
        with pytest.raises(ConfigError, match="'toy_net' needs width"):
            create_model("toy_net")

    def test_an_argument_that_a_checkpoint_cannot_store_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="Argument 'scale' of model 'toy_net' is a Tensor"):
            create_model("toy_net", width=2, scale=torch.ones(2))

    def test_the_config_is_kept_as_plain_json(self) -> None:
        model = create_model("toys/toy_net", width=2, scale=OmegaConf.create([1.0, 2.0]))
        expected = {"name": "toy_net", "domain": "toys", "config": {"width": 2, "scale": [1.0, 2.0]}}
        assert model.zoo_config == json.loads(json.dumps(model.zoo_config)) == expected

    def test_a_variant_shows_its_own_defaults(self) -> None:
        defaults = {key: p.default for key, p in model_signature("toy_deep").items()}
        assert defaults == {"width": 4, "depth": 5, "heads": 1, "scale": 1.0}
        assert len(create_model("toy_deep").layers) == 5

    def test_card_counts_parameters_without_allocating(self) -> None:
        card = model_card("toy_deep")
        assert (card.domain, card.parameters) == ("toys", 5 * (4 * 4 + 4))
        assert model_card("toy_net").parameters is None

    def test_card_counts_with_the_typical_sizes_of_its_domain(self, monkeypatch: pytest.MonkeyPatch) -> None:
        domain = Domain(
            "toys", "", "", "", example_inputs="toys:inputs", example_sizes={"width": 3, "other": 1}
        )
        monkeypatch.setitem(registry._DOMAINS, "toys", domain)
        card = model_card("toy_net")
        assert (card.parameters, card.sizes) == (2 * (3 * 3 + 3), {"width": 3})
        monkeypatch.setattr(
            registry, "load_object", lambda _: lambda *, width, depth, **_: (torch.ones(1, width),)
        )
        assert count_flops("toy_net") == 2 * (2 * 3 * 3)

    def test_operations_are_not_counted_without_example_inputs(self) -> None:
        assert count_flops("toy_deep") is None

    def test_argument_docs_come_from_the_docstring(self) -> None:
        text = "number of layers; unused."
        expected = {
            "width": "channels, of every layer.",
            "depth": text,
            "heads": text,
            "scale": "stored only.",
        }
        assert argument_docs("toy_net") == expected

    def test_arguments_that_a_class_hands_to_its_base_are_known(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Base(torch.nn.Module):
            """A class.

            Args:
                base: of the base.
            """

            def __init__(self, *, base: int = 1, shared: int = 2) -> None:
                super().__init__()

        class Derived(Base):
            """A class.

            Args:
                own: of the class.
            """

            def __init__(self, *, own: int = 3, shared: int = 4, **options: int) -> None:
                super().__init__(shared=shared, **options)

        entry = dataclasses.replace(
            registry._MODELS["toy_deep"], model=Derived, builder=lambda **_: Derived()
        )
        monkeypatch.setitem(registry._MODELS, "toy_deep", entry)
        found = {key: p.default for key, p in model_signature("toy_deep").items()}
        assert found == {"base": 1, "shared": 4, "own": 3}
        assert argument_docs("toy_deep") == {"base": "of the base.", "own": "of the class."}

    def test_a_name_belongs_to_one_domain(self) -> None:
        def toy_net() -> torch.nn.Module:
            return torch.nn.Identity()

        facts = {"summary": "", "paper": "", "licence": "", "source": "", "status": "official parity"}
        with pytest.raises(ValueError, match="already a model of domain 'toys'"):
            register_model(model=torch.nn.Identity, **facts)(toy_net)
        with pytest.raises(ValueError, match="status is 'done'"):
            register_model(model=torch.nn.Identity, **(facts | {"status": "done"}))


# ---- weights -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("toys")
class TestWeights:
    def test_checkpoint_path_brings_config_and_weights(self, tmp_path: Path) -> None:
        model = create_model("toy_net", width=3, depth=4)
        save_model(model, tmp_path / "a.safetensors")
        again = create_model("toy_net", checkpoint_path=tmp_path / "a.safetensors")
        _assert_same(model, again)

    def test_checkpoint_path_of_bare_tensors_needs_the_arguments(self, tmp_path: Path) -> None:
        model = create_model("toy_net", width=3)
        save_state_dict(model.state_dict(), tmp_path / "a.pth")
        _assert_same(model, create_model("toy_net", checkpoint_path=tmp_path / "a.pth", width=3))

    def test_a_checkpoint_of_another_model_is_refused(self, tmp_path: Path) -> None:
        save_model(create_model("toy_deep"), tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match=r"a.safetensors holds a 'toy_deep', not a 'toy_net'"):
            create_model("toy_net", checkpoint_path=tmp_path / "a.safetensors")

    def test_a_model_without_published_weights_says_what_to_do(self) -> None:
        with pytest.raises(UnknownName, match=r"No weights of 'toy_net' are published. Train it"):
            create_model("toy_net", pretrained=True, width=3)

    def test_pretrained_loads_the_card_and_lets_overrides_win(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = create_model("toy_net", width=3, depth=1)
        _publish(monkeypatch, tmp_path, to_official(model), config={"scale": 2.0})
        loaded = create_model("toy_net", pretrained=True)
        _assert_same(model, loaded)
        assert loaded.scale == 2.0
        assert create_model("toy_net", pretrained="toy_weights", scale=3.0).scale == 3.0
        with pytest.raises(UnknownName, match=r"no weights 'toy_weight'. Did you mean 'toy_weights'"):
            create_model("toy_net", pretrained="toy_weight")

    def test_pretrained_with_a_converter_starts_part_of_the_model(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tensors = {"start": torch.full((3, 3), 7.0)}
        monkeypatch.setattr(
            create, "load_object", lambda _: lambda state, model: {"layers.0.weight": state["start"]}
        )
        _publish(monkeypatch, tmp_path, tensors, converter="some.module:start")
        model = create_model("toy_net", pretrained=True, width=3)
        assert torch.equal(model.layers[0].weight, tensors["start"])
        assert not torch.equal(model.layers[1].weight, tensors["start"])


def _publish(monkeypatch: pytest.MonkeyPatch, folder: Path, tensors: dict, **facts) -> None:
    """Give toy_net a checkpoint card whose file lies in the cache already."""
    import dataclasses

    monkeypatch.setenv("ZOO_CACHE", str(folder))
    card = cards.WeightCard(
        name="toy_weights",
        models=("toys/toy_net",),
        file="w.npz",
        licence="MIT",
        format="npz",
        url="http://x/w.npz",
    )
    card = dataclasses.replace(card, **facts)
    card.path.parent.mkdir(parents=True)
    save_state_dict(tensors, card.path)
    monkeypatch.setattr(create, "weight_card", {"toy_weights": card}.__getitem__)
    entry = registry._MODELS["toy_net"]
    listed = dataclasses.replace(entry.card, weights=("toy_weights",))
    registry._MODELS["toy_net"] = dataclasses.replace(entry, card=listed)


def _assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- official checkpoints ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("toys")
class TestOfficial:
    def test_there_and_back_through_tensors_arrays_and_file(self, tmp_path: Path) -> None:
        model = create_model("toy_net", width=3, depth=3)
        official = to_official(model)
        arrays = {name: value.numpy() for name, value in official.items()}
        save_state_dict(official, tmp_path / "official.npz")
        for checkpoint in (official, arrays, tmp_path / "official.npz", str(tmp_path / "official.npz")):
            loaded = from_official("toy_net", checkpoint)
            _assert_same(model, loaded)
            assert not loaded.training

    def test_official_options_reach_the_adapter_and_unknown_ones_are_named(self) -> None:
        official = to_official(create_model("toy_net", width=2))
        assert from_official("toys/toy_net", official, scale=0.5).scale == 0.5
        with pytest.raises(ConfigError, match=r"no option 'scal'. Did you mean 'scale'"):
            from_official("toy_net", official, scal=0.5)

    def test_optimiser_slots_are_ignored(self) -> None:
        official = to_official(create_model("toy_net", width=2)) | {"kernel_0/Adam": torch.ones(2)}
        assert from_official("toy_net", official).layers[0].weight.shape == (2, 2)

    def test_an_optional_tensor_may_be_absent(self) -> None:
        official = to_official(create_model("toy_net", width=2))
        del official["bias_1"]
        loaded = from_official("toy_net", official)
        assert torch.equal(loaded.layers[0].bias, official["bias_0"])
        assert torch.equal(loaded.layers[1].bias, torch.zeros(2))

    def test_every_difference_is_reported_by_its_official_name(self) -> None:
        official = to_official(create_model("toy_net", width=2))
        del official["kernel_1"]
        official |= {"kernel_stray": torch.ones(1), "bias_0": torch.ones(5)}
        with pytest.raises(CheckpointError) as error:
            from_official("toy_net", official)
        assert str(error.value).splitlines() == [
            "The given state dict does not fit official toy_net:",
            "  missing (1): kernel_1",
            "  unexpected (1): kernel_stray",
            "  wrong shape (1): bias_0 is [5], not [2]",
        ]

    def test_a_file_of_another_program_names_what_it_lacks(self) -> None:
        with pytest.raises(
            CheckpointError, match="no official checkpoint of 'toy_net': it has no tensor 'kernel_0'"
        ):
            from_official("toy_net", {"other": np.zeros(3)})

    def test_a_model_without_an_official_layout_says_so(self) -> None:
        with pytest.raises(CheckpointError, match="'toy_deep' has no official checkpoint layout"):
            to_official(create_model("toy_deep"))
        with pytest.raises(CheckpointError, match="Linear was not built by"):
            to_official(torch.nn.Linear(1, 1))


def test_a_domain_part_is_loaded_from_its_module() -> None:
    domain = Domain("x", "", task="pathlib:Path", data="json:dumps")
    assert domain.load("task") is Path
