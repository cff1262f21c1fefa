"""What a model family says about the checkpoints of its official program."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
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

    beside: ClassVar[tuple[str, ...]] = ()
    """Globs of names that the reader of a file gives to what lies in it beside the weights, e.g. the units of
    the outputs. `to_zoo` takes them; `to_official` does not give them."""

    own_modules: ClassVar[tuple[str, ...]] = ()
    """Children of the model that the official program does not have, e.g. another pool. They start anew from
    official files, and keep our names where the model is written in the official layout."""

    same: ClassVar[tuple[str, ...]] = ()
    """Official options that are constructor arguments of ours by the same names; one that is given wins over
    what `config` reads from the tensors, which does not see it."""

    wrapper: ClassVar[str | None] = None
    """Key under which PyTorch files of the official program hold the state dict, e.g. BasicSR's `params`."""

    others: ClassVar[dict[str, str]] = {}
    """Further programs that read this model in a layout of their own: their name -> `"module:function"`. The
    function takes the model and the `extra` of its checkpoint, and returns what a PyTorch file of the program
    holds, the tensors under `state_dict`. (Their files are read by way of `canonical`.)"""

    @staticmethod
    def facts(model: nn.Module, metadata: Mapping[str, str]) -> dict[str, Any]:
        """The `extra` of a checkpoint of ours, as far as an official file tells it beside the weights."""
        return {}

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

    @classmethod
    def options(cls) -> dict[str, inspect.Parameter]:
        """The official options: what `config` takes beside the tensors, and the `same`."""
        _, *own = inspect.signature(cls.config).parameters.values()
        same = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in cls.same]
        return {option.name: option for option in (*own, *same)}

    @classmethod
    def told(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Of the options that a file tells of the program that wrote it, those `config` knows."""
        known = cls.options()
        return {name: value for name, value in options.items() if name in known}

    @staticmethod
    def read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """State dict and official options of a folder; None where the official program writes no folders."""
        return None

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

    # ---- with the parts that the official program does not have ----

    @classmethod
    def exported(cls, tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """`to_official`, with the `own_modules` under our names."""
        rest, own = cls._parted(tensors)
        return cls.to_official(rest, cls._known(model)) | own

    @classmethod
    def imported(cls, state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """`to_zoo`, with the `own_modules` as far as the file has them."""
        rest, own = cls._parted(state_dict)
        return cls.to_zoo(rest, cls._known(model)) | own

    @classmethod
    def _parted(cls, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        own = {name: value for name, value in tensors.items() if name.partition(".")[0] in cls.own_modules}
        return {name: value for name, value in tensors.items() if name not in own}, own

    @classmethod
    def _known(cls, model: nn.Module) -> nn.Module:
        """The model without its `own_modules`; the weights are shared."""
        known = copy.copy(model)
        known.__dict__["_modules"] = {
            name: nn.Identity() if name in cls.own_modules else module
            for name, module in model._modules.items()
        }
        return known
