"""Generators of data: what can be told from their rows alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from parity.fixture import Fixture
from zoo.bench.synthetic import IGNORED
from zoo.bench.synthetic.recall import recalled


def _mqar(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The labels that our rule gives the recorded rows.

    Fillers are 0, which is no key. Where they are random (`random_non_queries`), one may be a key by chance
    that is not asked: then the recorded places are those that ask.
    """
    (tokens,), config = fixture.inputs("tokens"), fixture.spec["config"]
    labels = recalled(tokens, config["num_kv_pairs"])
    if config.get("random_non_queries", False):
        labels = labels.masked_fill(fixture.tensors["output/labels"] == IGNORED, IGNORED)
    return {"output/labels": labels}, {}


ADAPTERS = {"data_mqar": _mqar}
