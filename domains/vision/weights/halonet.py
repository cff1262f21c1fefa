"""HaloNet: timm's names <-> ours."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from domains.vision.weights.renamed import RenamedLayout


class HaloNetOfficial(RenamedLayout):
    """State dicts of timm's HaloNets."""

    first_conv = "stem.conv1.conv.weight"
    head = ("head.fc.*",)
    same = ("num_classes", "in_chans", "drop_rate", "drop_path_rate")
    maps = ("*.self_attn.q.weight", "*.self_attn.kv.weight")
    renames = (
        (r"^stem\.(\d)\.", lambda m: f"stem.conv{int(m[1]) // 2 + 1}."),
        (r"^stages\.3\.\d+\.0\.", "final_conv."),
        (r"\.expand\.", ".conv1_1x1."),
        (r"\.reduce\.", ".conv3_1x1."),
        (r"\.middle\.conv\.", ".conv2_kxk."),
        (r"\.middle\.gate\.", ".attn."),
        (r"\.middle\.norm\.", ".post_attn."),
        (r"\.middle\.attn\.(\w+_rel)", r".self_attn.pos_embed.\1"),
        (r"\.middle\.attn\.", ".self_attn."),
        (r"((?:shortcut|conv\d\w*|final_conv)\.)norm\.", r"\1bn."),
        (r"^head\.", "head.fc."),
    )

    @staticmethod
    def config(state_dict: dict[str, Tensor]) -> dict[str, Any]:
        """Which blocks attend, widths and depths are read from the tensors."""
        return {
            "in_chans": state_dict[HaloNetOfficial.first_conv].shape[1],
            "num_classes": len(state_dict.get("head.fc.weight", ())),
        } | _stages(state_dict)


def _stages(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    numbers = [re.match(r"stages\.(\d+)\.(\d+)\.", name) for name in state_dict]
    blocks = {(int(found[1]), int(found[2])) for found in numbers if found}
    attending = {at for at in blocks if f"stages.{at[0]}.{at[1]}.self_attn.q.weight" in state_dict}
    stages = range(1 + max(stage for stage, _ in blocks))
    return {
        "dims": [len(state_dict[f"stages.{i}.0.conv3_1x1.conv.weight"]) for i in stages],
        "depths": [sum(stage == i for stage, _ in blocks) for i in stages],
        "attention_blocks": [sorted(b for stage, b in attending if stage == i) for i in stages],
    }
