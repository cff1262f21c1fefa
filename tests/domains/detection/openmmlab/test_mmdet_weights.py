"""Weights of Conditional DETR in the layout of mmdet: by the table alone, and against mmdet's own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import zoo
from domains.detection.transfer import official_facts
from domains.detection.weights.classes import NEVER, coco_ids, coco_names, fit_classes
from domains.detection.weights.detect import detect
from domains.detection.weights.openmmlab import from_official, is_mmdet, to_official
from zoo.cli.weights import app
from zoo.errors import CheckpointError, ConfigError, ZooError
from zoo.weights.checkpoint import load_model, save_model
from zoo.weights.exchange import to_official as official_of
from zoo.weights.exchange import to_other

TINY = {"num_queries": 5, "backbone": "resnet18", "embed_dim": 32, "enc_layers": 1, "dec_layers": 2}
"""In mmdet the width of positions and the heads follow from these."""
SIZES = {"num_heads": 4, "ffn_dim": 48}


def _model(num_classes: int = 7, groups: int = 1) -> Any:
    return zoo.create_model(
        "detection/conditional_detr_r50", num_classes=num_classes, groups=groups, **TINY, **SIZES
    ).eval()


def _run(*arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments])
    if isinstance(done.exception, ZooError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


# ---- the table ---------------------------------------------------------------------------------------------


def test_every_tensor_goes_to_mmdet_and_back() -> None:
    official = official_of(_model())
    theirs = from_official(official, 5)
    assert is_mmdet(theirs)
    assert not is_mmdet(official)
    back = to_official(theirs)
    assert back.keys() == official.keys()
    assert all(torch.equal(back[name], value) for name, value in official.items())


def test_a_file_of_mmdet_is_read_as_an_official_one(tmp_path: Path) -> None:
    model = _model()
    torch.save(to_other(model, "mmdet", {}), tmp_path / "mmdet.pth")
    again = zoo.from_official("detection/conditional_detr_r50", tmp_path / "mmdet.pth", nheads=4)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(x)["boxes"], model(x)["boxes"])


def test_the_published_size_is_recognised() -> None:
    with torch.device("meta"):
        official = official_of(zoo.create_model("detection/conditional_detr_r50", num_classes=80))
    assert detect(from_official(official, 300)) == "conditional_detr_r50"


def test_of_several_groups_the_first_is_written() -> None:
    model = _model(groups=3)
    state = to_other(model, "mmdet", {})["state_dict"]
    assert torch.equal(state["query_embedding.weight"], model.query_embed.weight[:5])


def test_coco_category_ids_become_80_classes_and_back() -> None:
    model = _model(91)
    content = to_other(model, "mmdet", {})
    head = content["state_dict"]["bbox_head.fc_cls.weight"]
    assert torch.equal(head, model.class_embed.weight[coco_ids()])
    assert content["meta"]["dataset_meta"]["classes"][0] == "person"
    assert content["meta"]["dataset_meta"]["classes"][79] == "toothbrush"
    back = fit_classes({"class_embed.weight": head, "class_embed.bias": torch.ones(80)}, 91)
    assert torch.equal(back["class_embed.weight"][coco_ids()], head)
    holes = [i for i, name in enumerate(coco_names()) if name is None]
    assert len(holes) == 11
    assert not back["class_embed.weight"][holes].any()
    assert back["class_embed.bias"][holes].tolist() == pytest.approx([NEVER] * 11)


def test_own_classes_keep_their_rows_and_names() -> None:
    model = _model(3)
    extra = {"classes": ["a", None, "b"], "category_ids": [1, None, 4]}
    content = to_other(model, "mmdet", extra)
    assert content["meta"]["dataset_meta"]["classes"] == ("a", "b")
    assert torch.equal(content["state_dict"]["bbox_head.fc_cls.bias"], model.class_embed.bias[[0, 2]])


def test_80_outputs_are_coco_in_its_order() -> None:
    facts = official_facts(_model(80))
    assert facts["classes"][:2] == ["person", "bicycle"]
    assert facts["category_ids"] == coco_ids()


# ---- the command -------------------------------------------------------------------------------------------


def test_convert_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = _model(91)
    save_model(model, "own.safetensors")
    assert "in the layout of mmdet" in _run("convert", "own.safetensors", "to=mmdet", "output=theirs.pth")
    _run("convert", "theirs.pth", "model=conditional_detr_r50", "nheads=4", "output=again.safetensors")
    again, extra = load_model("again.safetensors")
    assert extra["category_ids"] == coco_ids()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found, wanted = again(x)["logits"], model(x)["logits"][..., coco_ids()]
    torch.testing.assert_close(found, wanted)


def test_what_mmdet_cannot_take_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(zoo.create_model("detection/group_dab_mini"), "dab.safetensors")
    with pytest.raises(ConfigError, match="mmdet has no 'group_dab_mini'"):
        _run("convert", "dab.safetensors", "to=mmdet", "output=x.pth")
    learned = zoo.create_model("detection/conditional_detr_r50", **TINY, **SIZES, position="learned")
    save_model(learned, "learned.safetensors")
    with pytest.raises(CheckpointError, match=r"no 'backbone\.1\.\w+.*ZooDetector"):
        _run("convert", "learned.safetensors", "to=mmdet", "output=x.pth")
    save_model(_model(), "own.safetensors")
    with pytest.raises(CheckpointError, match=r"also holds meta, as only \.pth"):
        _run("convert", "own.safetensors", "to=mmdet", "output=x.safetensors")


# ---- files of the runner -----------------------------------------------------------------------------------


class HistoryBuffer:
    """Pickled as mmengine's class of this name is."""

    __module__ = "mmengine.logging.history_buffer"

    def __init__(self) -> None:
        import numpy as np

        self._log_history, self.last = np.arange(3.0), np.float64(2)


def _save_as_runner(path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file as a runner writes it in training."""
    import sys
    from types import ModuleType

    HistoryBuffer.__qualname__ = "HistoryBuffer"
    for name in ("mmengine", "mmengine.logging", HistoryBuffer.__module__):
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = sys.modules[HistoryBuffer.__module__]
    monkeypatch.setattr(module, "HistoryBuffer", HistoryBuffer, raising=False)
    hub = {"log_scalars": {"train/loss": HistoryBuffer()}}
    meta = {"epoch": 1, "dataset_meta": {"classes": ("cat", "dog"), "palette": [(1, 2, 3)]}}
    torch.save({"meta": meta, "state_dict": state, "message_hub": hub}, path)
    monkeypatch.undo()


def test_a_runner_file_is_read_without_building_its_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save_as_runner(tmp_path / "epoch_1.pth", to_other(_model(2), "mmdet", {})["state_dict"], monkeypatch)
    monkeypatch.chdir(tmp_path)
    _run("convert", "epoch_1.pth", "model=conditional_detr_r50", "nheads=4", "output=own.safetensors")
    model, extra = load_model("own.safetensors")
    assert extra["classes"] == ["cat", "dog"]
    assert extra["category_ids"] == [1, 2]
    assert model.num_classes == 2


def test_a_runner_file_that_would_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("code runs",)

    monkeypatch.setattr(HistoryBuffer, "__getstate__", lambda self: {"trap": Trap()}, raising=False)
    _save_as_runner(tmp_path / "bad.pth", {"a": torch.ones(1)}, monkeypatch)
    with pytest.raises(CheckpointError, match=r"would run code.*its pickle names print"):
        zoo.from_official("detection/conditional_detr_r50", tmp_path / "bad.pth")


# ---- against mmdet -----------------------------------------------------------------------------------------


def _their_config(num_classes: int) -> Any:
    import mmdet  # pyright: ignore[reportMissingImports]
    from mmengine.config import Config  # pyright: ignore[reportMissingImports]

    name = "conditional-detr_r50_8xb2-50e_coco.py"
    cfg = Config.fromfile(Path(mmdet.__file__).parent / ".mim" / "configs" / "conditional_detr" / name)
    cfg.model.backbone.init_cfg = None
    cfg.model.bbox_head.num_classes = num_classes
    return cfg.model


@pytest.fixture(scope="module")
def theirs(mmdet: None) -> Any:
    """mmdet's Conditional DETR R50 with lively weights."""
    from mmdet.registry import MODELS  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    model = MODELS.build(_their_config(80)).eval()
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.backbone.named_buffers()):
            if "fc_reg" in name or name.endswith(("bias", "running_mean")):
                value.normal_(std=0.1)
            elif name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif name.endswith(("bn3.weight", "downsample.1.weight")):
                value.fill_(0.5)
    return model


def _samples(sizes: list[tuple[int, int]], whole: tuple[int, int]) -> list[Any]:
    from mmdet.structures import DetDataSample  # pyright: ignore[reportMissingImports]

    same = {"batch_input_shape": whole, "pad_shape": whole, "scale_factor": (1.0, 1.0)}
    return [DetDataSample(metainfo={"img_shape": size, "ori_shape": size, **same}) for size in sizes]


def test_with_equal_weights_both_programs_predict_the_same(theirs: Any) -> None:
    ours: Any = zoo.from_official("detection/conditional_detr_r50", theirs.state_dict())
    x, samples = torch.randn(2, 3, 128, 160), _samples([(128, 160), (96, 128)], (128, 160))
    mask = torch.zeros(2, 128, 160, dtype=torch.bool)
    mask[1, 96:] = mask[1, :, 128:] = True
    with torch.no_grad():
        inputs = theirs.forward_transformer(theirs.extract_feat(x), samples)
        logits, boxes = theirs.bbox_head(**inputs)
        outputs = ours(x, mask, auxiliary=True)
    assert float(boxes.std()) > 0.05
    for i, part in enumerate((*outputs["auxiliary"], outputs)):
        torch.testing.assert_close(
            part["logits"], logits[i], rtol=0, atol=1e-5 * float(logits[i].abs().max())
        )
        torch.testing.assert_close(part["boxes"], boxes[i], rtol=0, atol=2e-6)


def test_mmdet_takes_every_tensor_that_is_written_for_it(theirs: Any) -> None:
    ours: Any = zoo.from_official("detection/conditional_detr_r50", theirs.state_dict())
    content = to_other(ours, "mmdet", {})
    state = theirs.state_dict()
    assert content["state_dict"].keys() == state.keys()
    assert all(torch.equal(content["state_dict"][name], value) for name, value in state.items())
    theirs.load_state_dict(content["state_dict"], strict=True)
    assert len(content["meta"]["dataset_meta"]["classes"]) == 80


@pytest.mark.usefixtures("mmdet")
@pytest.mark.parametrize("kind", ["inference", "training"])
def test_the_benchmark_compares_equal_work(kind: str) -> None:
    """In training: matching, losses and gradients of all parameters agree with mmdet's."""
    from domains.detection.openmmlab import bench

    case = bench.inference(64, 96, rounds=1) if kind == "inference" else bench.training(2, 64, 96)
    job = case.build(torch.device("cpu"))
    ours, theirs = job.ours_result(), job.peer_result()
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4
