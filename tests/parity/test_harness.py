"""The harness itself: it must notice what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from parity.adapters import traffic
from parity.fixture import BUNDLED, Fixture, NoAdapter, drawn, subsampled


@pytest.fixture
def fixture() -> Fixture:
    return Fixture(BUNDLED / "traffic" / "gman_tf_tiny_bay.json")


def test_a_value_outside_the_tolerance_is_reported(fixture: Fixture) -> None:
    expected = fixture.tensors["output/pred"]
    assert fixture.check("output/pred", expected) is None
    assert "off by 0.1" in str(fixture.check("output/pred", expected + 0.1))
    assert "shape" in str(fixture.check("output/pred", expected[1:]))
    assert fixture.check("output/pred", expected * torch.nan) is not None


def test_subsampling_rules() -> None:
    full = torch.arange(2 * 6 * 5).view(2, 6, 5)
    assert torch.equal(subsampled(full, "nodes [::4] on axis 1", (2, 2, 5)), full[:, ::4])
    assert torch.equal(subsampled(full, "nodes [::2]", (2, 6, 3)), full[:, :, ::2])
    with pytest.raises(ValueError, match="no slice"):
        subsampled(full, "every other node", (2, 6, 3))


def test_drawn_weights_keep_to_their_role() -> None:
    assert drawn("a.running_var", (1000,), 1.0).min() >= 1
    assert abs(drawn("a.weight", (1000,), 1.0).mean() - 1) < 0.02
    assert abs(drawn("a.bias", (1000,), 1.0).mean()) < 0.02
    assert drawn("a.weight", (100, 25), 2.0).std() == pytest.approx(2 / 5, rel=0.05)


def test_a_model_without_adapter_is_told(fixture: Fixture, tmp_path: Path) -> None:
    path = tmp_path / "traffic" / "other.json"
    path.parent.mkdir()
    path.write_text(json.dumps(fixture.spec | {"model": "Other"}))
    with pytest.raises(NoAdapter, match="Other"):
        traffic.run(Fixture(path))
