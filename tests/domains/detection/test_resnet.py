"""Backbones of detectors: torchvision's function with folded norms, levels, dilation, others by name."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from domains.detection.models.backbones import create_backbone
from domains.detection.models.resnet import FoldedConv, ResNet
from zoo.errors import ConfigError, UnknownName


def _peer(name: str, dilation: bool, norm: Any = FrozenBatchNorm2d) -> nn.Module:
    peer = getattr(torchvision.models, name)(
        norm_layer=norm, replace_stride_with_dilation=[False, False, dilation]
    )
    del peer.fc
    for module in peer.modules():
        if isinstance(module, norm):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.3, 0.6)
            nn.init.normal_(module.bias, std=0.1)
    return peer


def _maps(peer: Any, x: Tensor) -> list[Tensor]:
    x = peer.maxpool(peer.relu(peer.bn1(peer.conv1(x))))
    maps = [x := getattr(peer, f"layer{i}")(x) for i in range(1, 5)]
    return maps[-3:]


@pytest.mark.parametrize(
    ("name", "dilation"), [("resnet18", False), ("resnet34", False), ("resnet50", False), ("resnet50", True)]
)
def test_maps_are_torchvisions(name: str, dilation: bool) -> None:
    peer, model = _peer(name, dilation).eval(), ResNet(name, 3, dilation=dilation).eval()
    model.load_state_dict(peer.state_dict())
    x = torch.randn(2, 3, 65, 90)
    with torch.no_grad():
        ours, theirs = model(x), _maps(peer, x)
    for a, b, channels, stride in zip(ours, theirs, model.channels, model.strides, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert a.shape == (2, channels, -(-65 // stride), -(-90 // stride))
        assert a.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("name", "dilation"), [("resnet18", False), ("resnet50", True)])
def test_gradients_are_torchvisions(name: str, dilation: bool) -> None:
    peer, model = _peer(name, dilation), ResNet(name, 3, dilation=dilation, frozen_stages=0)
    model.load_state_dict(peer.state_dict())
    x = torch.randn(2, 3, 65, 64)
    for network, maps in ((model, model(x)), (peer, _maps(peer, x))):
        torch.stack([m.square().mean() for m in maps]).sum().backward()
        assert all(p.grad is not None for p in network.parameters())
    theirs = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected = theirs[name].grad
        assert expected is not None
        assert (parameter.grad - expected).norm() < 1e-4 * expected.norm(), name


def test_gradients_of_norms_that_train_in_evaluation_are_torchvisions() -> None:
    peer, model = (
        _peer("resnet18", False, nn.BatchNorm2d).eval(),
        ResNet("resnet18", 3, norm="batch", frozen_stages=0),
    )
    model.load_state_dict(peer.state_dict())
    x = torch.randn(2, 3, 64, 64)
    for maps in (model.eval()(x), _maps(peer, x)):
        torch.stack([m.square().mean() for m in maps]).sum().backward()
    ours, theirs = (dict(network.named_parameters()) for network in (model, peer))
    for name in ("layer2.0.downsample.1.bias", "layer3.1.bn2.weight", "layer4.0.conv1.weight"):
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-3, atol=1e-5)


def _fused() -> ResNet:
    model = ResNet("resnet50").eval()
    model.load_state_dict(_peer("resnet50", False).state_dict())
    model.fuse_()
    return model


def test_a_fused_copy_prepares_its_weights_and_gives_the_same_maps() -> None:
    model, x = _fused(), torch.randn(3, 3, 128, 128)
    (expected,) = model(x)
    with torch.inference_mode():
        torch.testing.assert_close(model(x)[0], expected, rtol=1e-4, atol=1e-4 * float(expected.max()))
        again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        torch.testing.assert_close(again(x)[0], model(x)[0], rtol=0, atol=0)
    convs = [m for m in model.modules() if isinstance(m, FoldedConv)]
    assert len(convs) == 53
    assert sum(conv.prepared_for_winograd for conv in convs) == 5  # of stage 3; maps of stage 4 are too small


def test_a_fused_copy_notices_other_weights() -> None:
    model, x = _fused(), torch.randn(3, 3, 128, 128)
    with torch.no_grad():
        model(x)
    model.load_state_dict(_fused().state_dict())
    (expected,) = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], expected, rtol=1e-4, atol=1e-4 * float(expected.max()))


def test_a_batch_norm_follows_the_batch_in_training_and_is_folded_in_evaluation() -> None:
    peer = _peer("resnet18", False, nn.BatchNorm2d)
    model = ResNet("resnet18", 3, norm="batch")
    model.load_state_dict(peer.state_dict())
    x = torch.randn(2, 3, 64, 64)
    for training in (True, False):
        ours, theirs = model.train(training)(x), _maps(peer.train(training), x)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.bn1.running_mean, peer.bn1.running_mean)  # pyright: ignore


def test_stem_and_first_stage_are_frozen() -> None:
    frozen = {name for name, p in ResNet("resnet18").named_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"conv1", "layer1"}
    assert {name for name in ResNet("resnet18").state_dict() if name.startswith("bn1.")} == {
        "bn1.weight",
        "bn1.bias",
        "bn1.running_mean",
        "bn1.running_var",
    }


def test_backbones_by_name() -> None:
    for name, options, channels, strides in (
        ("resnet_mini", {}, (64, 128), (8, 16)),
        ("timm/resnet18", {}, (256, 512), (16, 32)),
        ("efficientvit_m0", {}, (128, 192), (32, 64)),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2}, (384, 768), (16, 32)),
    ):
        model = create_backbone(name, 2, **options)
        maps = model.eval()(torch.randn(1, 3, 64, 64))
        assert (model.channels, model.strides) == (channels, strides), name
        assert [tuple(m.shape) for m in maps] == [
            (1, c, 64 // s, 64 // s) for c, s in zip(channels, strides, strict=True)
        ], name


@pytest.mark.parametrize(
    ("name", "levels", "options", "message"),
    [
        ("resnet18", 1, {"dilation": True}, "basic blocks, which cannot be dilated"),
        ("resnet50", 5, {}, "1 to 4 levels, not 5"),
        ("resnet50", 1, {"norm": "group"}, "frozen or batch, not 'group'"),
        ("resnet51", 1, {}, "no backbone 'resnet51'. Did you mean .*'resnet50'"),
        ("timm/resnet18", 9, {}, "does not give 9 maps"),
    ],
)
def test_what_is_no_backbone(name: str, levels: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, UnknownName), match=message):
        create_backbone(name, levels, **options)
