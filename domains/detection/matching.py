"""One-to-one matching in groups (Chen et al. 2022, Group DETR), and the loss over the pairs it finds.

The costs of all outputs, images and groups come to the processor in one transfer, and the pairs go back in
one.

Shapes: L outputs (decoder layers), B images, G groups of N queries, Q = G N, T targets of an image, M pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from domains.detection.losses import Fields, Focal, Term, check_targets, mean_over_ranks, wide
from domains.detection.models.denoising import Denoised, Noised
from zoo.errors import ConfigError, DataError


class Matches(NamedTuple):
    """M pairs of query and target in each of L outputs, on the device of the predictions.

    Ordered by image, then group, then query.
    """

    image: Tensor
    """`(M,)`"""
    query: Tensor
    """`(L, M)`, of all groups."""
    target: Tensor
    """`(L, M)`, within the image."""


class Matcher:
    """Hungarian matching by the focal cost of the class and the terms, for each output, image and group."""

    def __init__(self, terms: Sequence[Term], focal: Focal) -> None:
        self.terms, self.focal = tuple(terms), focal

    @torch.no_grad()
    def __call__(self, outputs: Fields, targets: Sequence[Fields], groups: int = 1) -> Matches:
        """
        Args:
            outputs: `logits` `(L, B, Q, C)` and the fields of the terms `(L, B, Q, ...)`.
            targets: of each image, `labels` `(T,)` and the fields of the terms `(T, ...)`.
            groups: G.

        Raises:
            ConfigError: queries that cannot be shared out to the groups.
            DataError: NaN or infinity in a cost; the message names output, image and term.
        """
        logits = outputs["logits"]
        if groups < 1 or logits.shape[2] % groups:
            raise ConfigError(f"{logits.shape[2]} queries cannot be shared out evenly to {groups} groups.")
        with torch.autocast(logits.device.type, enabled=False):
            costs = [self._cost(outputs, i, target) for i, target in enumerate(targets)]
        flat = torch.cat([cost.flatten() for cost in costs]).cpu()
        if not bool(flat.isfinite().all()):
            self._explain(outputs, targets, costs)
        pairs = _solved(flat.numpy(), [tuple(cost.shape) for cost in costs], groups)
        image, query, target = torch.from_numpy(pairs).to(logits.device)
        return Matches(image[0], query, target)

    def _cost(self, outputs: Fields, image: int, target: Fields) -> Tensor:
        """`(L, Q, T)`"""
        parts = self._costs(outputs, image, target)
        weight, cost = parts.pop("class")
        cost = weight * cost
        for weight, part in parts.values():
            cost = cost.add_(part, alpha=weight)
        return cost

    def _costs(self, outputs: Fields, image: int, target: Fields) -> dict[str, tuple[float, Tensor]]:
        """Weight and cost `(L, Q, T)` by the name of the term."""
        fields = {name for term in self.terms for name in term.fields}
        logits = wide({"logits": outputs["logits"][:, image]})["logits"]
        predicted = wide({name: outputs[name][:, image, :, None] for name in fields})
        classes = self.focal.pair_costs(logits, target["labels"])
        parts = {"class": (self.focal.cost, classes)}
        return parts | {term.name: (term.cost, term.distance(predicted, target)) for term in self.terms}

    def _explain(self, outputs: Fields, targets: Sequence[Fields], costs: Sequence[Tensor]) -> None:
        for i, cost in enumerate(costs):
            if bool(cost.isfinite().all()):
                continue
            for name, (_, part) in self._costs(outputs, i, targets[i]).items():
                if not bool(part.isfinite().all()):
                    output, query, target = (~part.isfinite()).nonzero()[0].tolist()
                    raise DataError(
                        f"The matching cost {name!r} of image {i} is {float(part[output, query, target])} "
                        f"(output {output}, query {query}, target {target}). The predictions have left the "
                        "range of numbers: lower the learning rate or clip gradients; in half precision, "
                        "train in bf16 or float32."
                    )
            raise DataError(f"The matching costs of image {i} add up to more than the range of numbers.")


def _solved(flat: np.ndarray, shapes: Sequence[tuple[int, ...]], groups: int) -> np.ndarray:
    """Pairs `(3, L, M)` of image, query and target."""
    found, start = [], 0
    for image, (layers, queries, count) in enumerate(shapes):
        size, members = layers * queries * count, queries // groups
        blocks = flat[start : start + size].reshape(layers, groups, members, count)
        start += size
        pairs = np.empty((3, layers, groups, min(members, count)), dtype=np.int64)
        pairs[0] = image
        for layer, group in np.ndindex(layers, groups):
            rows, columns = linear_sum_assignment(blocks[layer, group])
            pairs[1, layer, group], pairs[2, layer, group] = rows + group * members, columns
        found.append(pairs.reshape(3, layers, -1))
    return np.concatenate(found, -1)


class SetLoss:
    """Matches every output anew and sums the focal loss and the terms over its pairs.

    Args:
        terms: for example `box_terms()`.
        focal: classification.

    The total is over all outputs, each divided by the number of targets times groups, averaged over the
    processes and at least 1, so that its scale does not depend on G.
    """

    def __init__(self, terms: Sequence[Term], focal: Focal | None = None) -> None:
        self.terms, self.focal = tuple(terms), focal or Focal()
        self.matcher = Matcher(self.terms, self.focal)
        self._fields = ["logits", *(name for term in self.terms for name in term.fields)]

    def __call__(
        self, outputs: Sequence[Fields], targets: Sequence[Fields], groups: int = 1
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its unweighted parts `loss_ce`, `loss_NAME` of the last output, of output i with the
        suffix `_i`.

        Args:
            outputs: predictions of each output, the final one last: `logits` `(B, Q, C)` and the fields of
                the terms.
            targets: of each image, `labels` `(T,)` and the fields of the terms.
            groups: G.

        Raises:
            ConfigError, DataError: see `Matcher` and `check_targets`.
        """
        stacked = stack(outputs, self._fields)
        reads = [name for term in self.terms for name in term.reads]
        check_targets(targets, stacked["logits"].shape[-1], reads)
        matches = self.matcher(stacked, targets, groups)
        with torch.autocast(stacked["logits"].device.type, enabled=False):
            parts = self.parts(stacked, targets, matches, groups)
        return self._total(parts), dict(_named(parts))

    def denoising(self, denoised: Denoised, targets: Sequence[Fields]) -> Tensor:
        """The same loss of noised objects, each of which is matched with its own."""
        noised = denoised["noised"]
        fields = stack(denoised["outputs"], self._fields)
        # What only fills up says "nothing" with no loss.
        fields["logits"] = fields["logits"].masked_fill(~noised.real[..., None], -100.0)
        with torch.autocast(fields["logits"].device.type, enabled=False):
            parts = self.parts(fields, targets, own_objects(noised, len(fields["logits"])), noised.groups)
        return self._total(parts)

    def _total(self, parts: Mapping[str, Tensor]) -> Tensor:
        weights = {"ce": self.focal.weight} | {term.name: term.weight for term in self.terms}
        return torch.stack([weights[name] * part.sum() for name, part in parts.items()]).sum()

    def parts(
        self, stacked: Fields, targets: Sequence[Fields], matches: Matches, groups: int
    ) -> dict[str, Tensor]:
        """The unweighted parts `(L,)` by name."""
        stacked = wide(stacked)
        logits, count = stacked["logits"], sum(len(target["labels"]) for target in targets)
        scale = mean_over_ranks(logits.new_tensor(float(count * groups))).clamp(min=1)
        layer = torch.arange(len(logits), device=logits.device)[:, None].expand_as(matches.query)
        at = (layer, matches.image.expand_as(matches.query), matches.query)
        found = joined(targets, {"labels", *(name for term in self.terms for name in term.reads)}, matches)
        predicted = {name: stacked[name][at] for term in self.terms for name in term.fields}
        entry = (*at, found["labels"])
        aims = torch.zeros_like(logits).index_put_(entry, self.focal.aim(logits[entry], predicted, found))
        parts = {"ce": self.focal.loss(logits, aims).sum((1, 2, 3)) / scale}
        for term in self.terms:
            parts[term.name] = term.distance(predicted, found).sum(-1) / scale
        return parts


def own_objects(noised: Noised, layers: int) -> Matches:
    """The queries that are to find an object, with it, in each of so many layers."""
    per_group = noised.real.unflatten(1, (noised.groups, 2, -1))
    finds = torch.zeros_like(per_group)
    finds[:, :, 0] = per_group[:, :, 0]
    image, query = finds.flatten(1).nonzero(as_tuple=True)
    target = query % per_group.shape[-1]
    return Matches(image, query.expand(layers, -1), target.expand(layers, -1))


def stack(outputs: Sequence[Fields], names: Sequence[str]) -> dict[str, Tensor]:
    """Fields `(B, ...)` of L outputs as `(L, B, ...)`."""
    return {name: torch.stack([output[name] for output in outputs]) for name in dict.fromkeys(names)}


def joined(targets: Sequence[Fields], names: set[str], matches: Matches) -> dict[str, Tensor]:
    """The target fields of each pair, `(L, M, ...)`."""
    counts = torch.tensor([len(target["labels"]) for target in targets])
    first = (counts.cumsum(0) - counts).to(matches.image.device)
    at = matches.target + first[matches.image]
    return {name: torch.cat([target[name] for target in targets])[at] for name in names}


def _named(parts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """`loss_NAME` of the last output, `loss_NAME_i` of the others."""
    for name, part in parts.items():
        *others, last = part.unbind()
        yield f"loss_{name}", last
        yield from ((f"loss_{name}_{i}", value) for i, value in enumerate(others))
