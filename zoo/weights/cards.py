"""Checkpoint cards: where published weights lie, what they are, and which model they are for."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from zoo.errors import CheckpointError, UnknownName, did_you_mean
from zoo.paths import cache_dir, cards_dir

HUB = "https://huggingface.co"


@dataclass(frozen=True)
class WeightCard:
    """One `checkpoints/NAME.yaml`."""

    name: str
    models: tuple[str, ...]
    """The models it is for, e.g. `traffic/st_llm`."""
    file: str
    """Name of the file at its origin and in the cache."""
    licence: str
    format: str
    """The source format in words: program, layout, file type."""
    url: str = ""
    """Address of the file, or"""
    hub: str = ""
    """repository of the Hugging Face hub that holds it, and"""
    revision: str = "main"
    """the revision there."""
    sha256: str | None = None
    size: int | None = None
    """Bytes."""
    converter: str = ""
    """`package.module:function` from its tensors to part of the model; empty: the model's official layout."""
    config: dict[str, Any] = field(default_factory=dict)
    """Official options (or, with a converter, constructor arguments) the file stands for."""
    metric: str = ""
    """What the weights reach in the official program, on which data."""
    notes: str = ""

    @property
    def address(self) -> str:
        """Where the file is downloaded from."""
        if self.url:
            return self.url
        return f"{HUB}/{self.hub}/resolve/{self.revision}/{self.file}"

    @property
    def path(self) -> Path:
        """Where the file lies once fetched."""
        return cache_dir() / "weights" / self.name / self.file


def list_cards() -> list[str]:
    """Names of all checkpoint cards, sorted."""
    return sorted(path.stem for path in cards_dir().glob("*.yaml"))


def weight_card(name: str) -> WeightCard:
    """The card called `name`.

    Raises:
        UnknownName: there is none; the message names the nearest.
        CheckpointError: the card has an unknown key or lacks one.
    """
    path = cards_dir() / f"{name}.yaml"
    if not path.is_file():
        names = list_cards()
        raise UnknownName(
            f"There is no checkpoint card {name!r}.{did_you_mean(name, names)} Cards: {', '.join(names)}."
        )
    return read_card(path)


def read_card(path: Path) -> WeightCard:
    """Read one card file."""
    content: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(path))  # pyright: ignore[reportAssignmentType]
    known = [f.name for f in fields(WeightCard)]
    for key in content:
        if key not in known:
            raise CheckpointError(f"{path}: unknown key {key!r}.{did_you_mean(key, known)}")
    try:
        card = WeightCard(**{"name": path.stem, **content, "models": tuple(content.get("models", ()))})
    except TypeError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if bool(card.url) == bool(card.hub):
        raise CheckpointError(f"{path}: give either url or hub.")
    return card


def is_non_commercial(licence: str) -> bool:
    """Whether a licence text forbids commercial use."""
    words = licence.lower().replace("_", "-").split()
    return "non-commercial" in " ".join(words) or any("-nc" in word for word in words)
