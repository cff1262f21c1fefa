"""What `enable_mmdet` says where it cannot work; these run with and without mmdet."""

from __future__ import annotations

import subprocess
import sys

import pytest

from domains.detection import openmmlab
from domains.detection.openmmlab import check_versions, enable_mmdet
from zoo.errors import ConfigError, MissingExtra

GOOD = {"mmdet": "3.3.0", "mmengine": "0.10.7", "mmcv-lite": "2.1.0"}


def _installed(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    found = GOOD | {name.replace("_", "-"): number for name, number in versions.items()}
    monkeypatch.setattr(openmmlab, "_version", found.get)


def test_the_versions_of_the_extra_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch)
    check_versions()


def test_a_compiled_mmcv_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, mmcv_lite=None, mmcv="2.1.0")
    check_versions()


@pytest.mark.parametrize("name", GOOD)
def test_what_is_missing_is_named_with_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, **{name.replace("-", "_"): None})
    with pytest.raises(MissingExtra, match=rf"needs {name.removesuffix('-lite')}: pip install .*\[mmdet\]"):
        enable_mmdet()


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"mmcv_lite": "2.2.0"}, "mmcv 2.2.0 is here; this needs 2.0.0 to below 2.2"),
        ({"mmdet": "2.28.2"}, "mmdet 2.28.2 is here; this needs 3.3 to below 3.4"),
        ({"mmengine": "0.7.1"}, "mmengine 0.7.1 is here; this needs 0.10.7"),
        ({"mmengine": "1.0.0rc1"}, "mmengine 1.0.0rc1"),
        ({"mmcv": "2.1.0"}, "both installed.*pip uninstall -y mmcv mmcv-lite"),
    ],
)
def test_versions_that_do_not_go_together_are_named(
    versions: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _installed(monkeypatch, **versions)
    with pytest.raises(ConfigError, match=message):
        check_versions()


def test_importing_the_package_touches_no_mmdet() -> None:
    program = (
        "import sys, domains.detection.openmmlab;"
        "print([m for m in sys.modules if m.split('.')[0] in ('mmdet', 'mmcv', 'mmengine')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
