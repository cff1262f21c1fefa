"""Composing configs: groups, overrides, and what a typo says."""

from __future__ import annotations

import inspect

import pytest
from omegaconf import OmegaConf

from zoo.config import compose
from zoo.create import create_model
from zoo.errors import ConfigError
from zoo.paths import config_dir
from zoo.registry import get_domain, model_signature

MODELS = sorted(f.stem for f in (config_dir() / "model").glob("*.yaml"))
_FOLDER = config_dir() / "domain"
DOMAINS = sorted(f.relative_to(_FOLDER).with_suffix("").as_posix() for f in _FOLDER.rglob("*.yaml"))
DATA = sorted(f.stem for f in (config_dir() / "data").glob("*.yaml"))


def test_the_domain_brings_its_default_model_and_data() -> None:
    config = compose("train", ["domain=traffic"])
    assert (config.model.name, config.data.name) == ("gman", "simulated")


def test_a_model_for_another_problem_brings_the_data_and_the_recipe_of_that() -> None:
    config = compose("train", ["domain=forecasting", "model=miga"])
    assert (config.domain.name, config.model.name) == ("forecasting", "miga")
    assert (config.data.name, config.data.top, config.optimizer.name) == ("simulated", 0.1, "adamw")
    assert compose("train", ["domain=forecasting/ranking"]) == config
    bare = compose("train", ["domain=forecasting", "model=gru_ranker", "model.hidden=8", "data.cost=0.01"])
    assert (bare.model.hidden, bare.data.cost, bare.data.name) == (8, 0.01, "simulated")


def test_data_and_model_that_are_named_win_over_those_of_the_problem() -> None:
    config = compose("train", ["domain=forecasting", "model=miga", "data=price_panel", "data.path=x.csv"])
    assert (config.model.name, config.data.path) == ("miga", "x.csv")
    other = compose("train", ["domain=forecasting/ranking", "model=chronos2_mini"])
    assert (other.model.name, other.data.name) == ("chronos2_mini", "synthetic")


def test_the_command_line_wins_over_the_domain() -> None:
    config = compose("train", ["domain=traffic", "model=stid", "trainer.max_epochs=3"])
    assert (config.model.name, config.trainer.max_epochs) == ("stid", 3)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_config_builds_its_model(name: str) -> None:
    config = compose("train", ["domain=traffic", f"model={name}"])
    arguments = {k: v for k, v in OmegaConf.to_container(config.model).items() if k != "name"}
    assert set(arguments) <= set(model_signature(config.model.name))
    needed = {"num_nodes": 10, "num_features": 5}
    sizes = {key: size for key, size in needed.items() if key in model_signature(config.model.name)}
    assert sum(p.numel() for p in create_model(config.model.name, **arguments, **sizes).parameters()) > 0


@pytest.mark.parametrize("name", DATA)
def test_every_data_config_is_accepted_by_a_data_module(name: str) -> None:
    data = compose("finetune", [f"data={name}"]).data
    modules = [get_domain(domain).load("data") for domain in DOMAINS]
    takers = [module for module in modules if set(data) <= set(inspect.signature(module).parameters)]
    assert len(takers) >= 1
    takers[0](**data)


def test_a_registered_model_without_a_config_is_chosen_by_its_name() -> None:
    config = compose("train", ["domain=vision", "model=efficientvit_m0", "model.dims=[24,32,48]"])
    assert config.model == {"name": "efficientvit_m0", "dims": [24, 32, 48]}
    assert config.optimizer.name == "adamw"


def test_augmentation_is_a_choice_that_the_command_line_refines() -> None:
    augment = compose("train", ["domain=vision", "aug=imagenet", "data.augment.mixup=0.1"]).data.augment
    assert (augment.aa, augment.mixup, augment.cutmix) == ("rand-m9-mstd0.5-inc1", 0.1, 1.0)


def test_a_trainer_argument_that_the_configs_do_not_list_is_accepted() -> None:
    assert compose("train", ["domain=traffic", "trainer.overfit_batches=2"]).trainer.overfit_batches == 2


def test_a_constructor_argument_that_the_configs_do_not_list_is_accepted() -> None:
    assert compose("train", ["domain=traffic", "data.num_workers=1"]).data.num_workers == 1


@pytest.mark.parametrize("devices", ["auto", "[0,1]", "2"])
def test_devices_are_whatever_lightning_takes(devices: str) -> None:
    assert str(compose("train", ["domain=traffic", f"trainer.devices={devices}"]).trainer.devices) in (
        devices,
        "[0, 1]",
    )


@pytest.mark.parametrize("verb", ["train", "bench"])
def test_a_verb_that_starts_from_nothing_asks_for_the_domain(verb: str) -> None:
    with pytest.raises(ConfigError, match=r"Choose a domain: .*traffic"):
        compose(verb, ["model=gman"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("domain=trafic", "traffic"),
        ("model=gmna", "gman"),
        ("domain=vision model=biformer_tinny", "biformer_tiny"),
        ("model=gmna", "Options: gman, gman_metr_la, gman_paper, gman_port, gman_small, st_link"),
        ("model=biformer_tiny", "domain=vision, not traffic"),
        ("domain=forecasting model=migaa", "miga"),
        ("domain=vision data.augment.mixp=0.1", "data.augment.mixup"),
        ("data=metr_al", "metr_la"),
        ("trainer.max_epoch=3", "trainer.max_epochs"),
        ("trainr.max_epochs=3", "trainer.max_epochs"),
        ("optimizer.learning_rate=1", "optimizer"),
        ("model.num_head=2", "model.num_heads"),
        ("data.pth=x", "data.path"),
        ("trainer.max_epochs=many", "number"),
        ("plots=7", "true or false"),
        ("data.history=1.5", "whole number"),
        ("data.batch_size=true", "whole number"),
        ("max epochs", "key=value"),
        ("domain=forecasting model=miga data.windw=5", "data.window"),
        ("domain=forecasting/rankin", "forecasting/ranking"),
        ("seed=1,2", "several values"),
    ],
)
def test_a_mistake_names_what_would_be_right(override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        compose("train", ["domain=traffic", override] if "domain" not in override else override.split())
