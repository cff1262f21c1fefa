from __future__ import annotations

import pytest
import torch

from zoo.devices import chosen_device
from zoo.errors import ConfigError


@pytest.mark.parametrize("gpu", [False, True])
def test_auto_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert chosen_device("auto") == torch.device("cuda" if gpu else "cpu")


def test_one_of_several_is_named_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize("name", ["gpu", "cuda:first", "meta", 0])
def test_an_unknown_device_names_the_options(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device={name} is not known. Options: auto, cpu, cuda, mps"):
        chosen_device(name)


def test_what_takes_fewer_kinds_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"device=mps is not known. Options: auto, cpu, cuda\."):
        chosen_device("mps", ("cpu", "cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device=cuda, but torch finds no GPU here"):
        chosen_device("cuda")
