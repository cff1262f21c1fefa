"""What a model family says about the checkpoints of its official program."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn


class OfficialLayout:
    """Official names <-> ours, for one model family; the subclass itself is `register_model(official=...)`.

    `zoo.from_official` asks for the constructor arguments, builds the model, compares the names and shapes of
    the file with what `to_official` gives for that model (every difference is reported by its official name),
    and loads what `to_zoo` returns. An adapter therefore needs no checks of its own.
    """

    ignored: ClassVar[tuple[str, ...]] = ()
    """Globs of official names that may be in a file and carry nothing, e.g. `("*/Adam", "*/Adam_1")`."""

    optional: ClassVar[tuple[str, ...]] = ()
    """Globs of official names that a file may lack; `to_zoo` then says what stands in their place."""

    unofficial: ClassVar[tuple[str, ...]] = ()
    """Globs of our names that no official file holds, e.g. a graph buffer that `bind` fills."""

    @staticmethod
    def canonical(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The file under the official names and shapes of today, where other published ones exist."""
        return state_dict

    @staticmethod
    def config(state_dict: dict[str, Tensor], **official_config: Any) -> dict[str, Any]:
        """Constructor arguments of ours, from shapes in `state_dict` and the official program's options.

        The keyword parameters an implementation names are the official options; any other is refused.
        """
        raise NotImplementedError

    @staticmethod
    def to_zoo(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Official tensors under our names: every entry of `model.state_dict()` but the `unofficial` ones."""
        raise NotImplementedError

    @staticmethod
    def to_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Our tensors under official names. Linear in the values, so it maps gradients as well."""
        raise NotImplementedError

    @classmethod
    def fitted(
        cls, state_dict: dict[str, Tensor], expected: dict[str, Tensor], model: nn.Module
    ) -> dict[str, Tensor]:
        """Official tensors made to fit a model that was built with other arguments than the file stands for.

        Args:
            state_dict: the file.
            expected: the official tensors of the model at init, which stand in for what the file cannot give.
        """
        return state_dict
