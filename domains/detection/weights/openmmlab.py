"""Conditional DETR of mmdet <-> its official program, by names.

One table serves both ways. Heads keep their rows: mmdet numbers classes without holes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from domains.detection.weights.classes import coco_ids, coco_names, with_rows
from zoo.errors import CheckpointError
from zoo.weights.exchange import to_official as in_official_layout

MARK = "bbox_head.fc_cls.weight"
"""A tensor that mmdet's Conditional DETR has, and its official program has not."""
COUNTER = "num_batches_tracked"


def _table() -> Iterator[tuple[str, str]]:
    """Beginnings of official names and of mmdet's; # is the number of a layer."""
    official, ours = "transformer.encoder.layers.#", "encoder.layers.#"
    yield f"{official}.self_attn.", f"{ours}.self_attn.attn."
    yield from _common(official, ours, norms=2)
    official, ours = "transformer.decoder.layers.#", "decoder.layers.#"
    for kind, attention in (("sa", "self_attn"), ("ca", "cross_attn")):
        for part in ("qcontent", "qpos", "kcontent", "kpos", "v", "qpos_sine"):
            yield f"{official}.{kind}_{part}_proj.", f"{ours}.{attention}.{part}_proj."
        yield f"{official}.{attention}.out_proj.", f"{ours}.{attention}.out_proj."
    yield from _common(official, ours, norms=3)
    yield "transformer.decoder.norm.", "decoder.post_norm."
    for head in ("query_scale", "ref_point_head"):
        yield f"transformer.decoder.{head}.", f"decoder.{head}."
    yield "input_proj.", "neck.convs.0.conv."
    yield "query_embed.", "query_embedding."
    yield "class_embed.", "bbox_head.fc_cls."
    for i, place in enumerate(("reg_ffn.layers.0.0", "reg_ffn.layers.1", "fc_reg")):
        yield f"bbox_embed.layers.{i}.", f"bbox_head.{place}."
    yield "backbone.0.body.", "backbone."


def _common(official: str, ours: str, norms: int) -> Iterator[tuple[str, str]]:
    yield f"{official}.linear1.", f"{ours}.ffn.layers.0.0."
    yield f"{official}.linear2.", f"{ours}.ffn.layers.1."
    for i in range(norms):
        yield f"{official}.norm{i + 1}.", f"{ours}.norms.{i}."


TABLE = tuple(_table())


def is_mmdet(state: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the names of mmdet's Conditional DETR."""
    return MARK in state


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names in the place of mmdet's; names that are in no table are kept, for a reader to refuse."""
    pairs = [(ours, official) for official, ours in TABLE]
    return {_renamed(name, pairs): value for name, value in state.items() if not name.endswith(COUNTER)}


def from_official(state: Mapping[str, Tensor], num_queries: int) -> dict[str, Tensor]:
    """mmdet's names in the place of the official ones, of the first group of queries.

    Raises:
        CheckpointError: a tensor that mmdet's Conditional DETR has no place for.
    """
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        renamed = _renamed(name, TABLE)
        if renamed == name:
            raise CheckpointError(
                f"mmdet's Conditional DETR has no {name!r}, so that it cannot take this model. A ZooDetector "
                "in mmdet takes any file of the zoo as it is: init_cfg=dict(type='Pretrained', "
                "checkpoint=FILE)."
            )
        out[renamed] = value[:num_queries] if name == "query_embed.weight" else value
        if name.endswith("running_mean"):
            counter = renamed.removesuffix("running_mean") + COUNTER
            out[counter] = torch.zeros((), dtype=torch.long)
    return out


def exported(model: nn.Module, extra: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint of mmdet's Conditional DETR: weights, and names of classes where they are known.

    Its classes have no holes: rows of numbers that stand for no class are left out, as 11 of COCO's 91.

    Args:
        extra: what the model's checkpoint holds beside the weights.

    Raises:
        CheckpointError: mmdet has no such model.
    """
    from domains.detection.transfer import official_facts

    facts = extra if extra.get("classes") else official_facts(model)
    rows = [i for i, name in enumerate(facts["classes"]) if name is not None]
    classes = tuple(str(facts["classes"][i]) for i in rows)
    state = with_rows(in_official_layout(model), rows)
    queries = int(model.num_queries)  # pyright: ignore[reportArgumentType]
    return {"meta": {"dataset_meta": {"classes": classes}}, "state_dict": from_official(state, queries)}


def facts_of(classes: Sequence[str]) -> dict[str, Any]:
    """What a checkpoint of ours holds beside the weights, from the names of classes in a file of mmdet."""
    coco = [name for name in coco_names() if name is not None]
    ids = coco_ids() if list(classes) == coco else list(range(1, len(classes) + 1))
    return {"data": None, "classes": list(classes), "category_ids": ids, "skeleton": None}


def _renamed(name: str, pairs: tuple[tuple[str, str], ...] | list[tuple[str, str]]) -> str:
    for given, wanted in pairs:
        found = re.match(re.escape(given).replace(r"\#", r"(\d+)"), name)
        if found:
            number = found[1] if found.groups() else ""
            return wanted.replace("#", number) + name[found.end() :]
    return name
