"""Capture: the attention maps of an unmodified model, by module name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from zoo.attention.backends import Problem, explicit_tiles, join
from zoo.attention.errors import AttentionError
from zoo.attention.patterns import Index, Pattern, whole

DENSE_LIMIT = 2**27


class MapTile(NamedTuple):
    """Weights `(T, H, nq, nk)` of T tiles, which token each place is, and scores where asked for."""

    weights: Tensor
    index: Index
    scores: Tensor | None


class AttentionMap:
    """One call of `attend`: weights after the kernel and before dropout, in the tiles of its pattern.

    Attributes:
        name: qualified name of the module that called.
        pattern: the pattern that it ran.
        tiles: the weights as they were computed: nothing of size N x N exists for a sparse pattern.
        values: `(B, Hk, Nk, Dv)`.
        output: `(B, H, Nq, Dv)`, before the projection.
        sizes: (B, H, Nq, Nk).
    """

    def __init__(
        self, name: str, pattern: Pattern, tiles: list[MapTile], values: Tensor, output: Tensor
    ) -> None:
        self.name = name
        self.pattern = pattern
        self.tiles = tiles
        self.values = values
        self.output = output
        self.sizes = (*output.shape[:3], values.shape[2])

    @property
    def weights(self) -> Tensor:
        """Dense weights `(B, H, Nq, Nk)`, zero where the pattern does not look."""
        return self._dense([tile.weights for tile in self.tiles], 0.0)

    @property
    def scores(self) -> Tensor:
        """Dense scores `(B, H, Nq, Nk)` before the kernel, -inf where the pattern does not look."""
        return self._dense([_asked(tile.scores, "scores=True") for tile in self.tiles], -torch.inf)

    @property
    def grad(self) -> Tensor:
        """Dense gradient `(B, H, Nq, Nk)` of what was differentiated since, by the weights."""
        return self._dense(
            [_asked(tile.weights.grad, "grad=True, and a backward pass") for tile in self.tiles], 0.0
        )

    def _dense(self, parts: list[Tensor], fill: float) -> Tensor:
        batch, heads, nq, nk = self.sizes
        if not self.pattern.tiled:
            return parts[0]
        if batch * heads * nq * nk > DENSE_LIMIT:
            raise AttentionError(
                f"{self.name}: a dense map of {self.sizes} is too large; read its tiles, or reduce"
            )
        # -1 in the index addresses one further row and column, which is dropped.
        out = self.values.new_full((batch, nq + 1, nk + 1, heads), fill, dtype=parts[0].dtype)
        for part, tile in zip(parts, self.tiles, strict=True):
            b, i, j = tile.index
            at = (b[:, :, None], i[:, :, None], j[:, None, :])
            out = out.index_put(at, part.permute(0, 2, 3, 1))
        return out[:, :nq, :nk].permute(0, 3, 1, 2)


def _asked(value: Tensor | None, how: str) -> Tensor:
    if value is None:
        raise AttentionError(f"not recorded: capture with {how}")
    return value


class _Recorder:
    """Follows which module runs, and keeps the maps of those that were asked for."""

    def __init__(
        self,
        model: nn.Module | None,
        modules: Sequence[str] | None,
        scores: bool,
        grad: bool,
        reduce: Callable[[AttentionMap], Any] | None,
    ) -> None:
        self.maps: dict[str, Any] = {}
        self.model, self.modules = model, modules
        self.scores, self.grad, self.reduce = scores, grad, reduce
        self.root = model
        self.names = {} if model is None else _names(model)
        self.running: list[nn.Module] = []
        self.ran = False
        self.passed: dict[str, None] = {}  # calls that were not asked for

    def enter(self, module: nn.Module, _inputs: tuple) -> None:
        if self.model is None and not self.running:
            self.root, self.names = module, _names(module)
        self.running.append(module)
        self.ran = self.ran or id(module) in self.names

    def leave(self, _module: nn.Module, _inputs: tuple, _output: Any) -> None:
        self.running.pop()

    def wanted(self) -> str | None:
        """Name of the innermost running module, where its calls are asked for."""
        found = next((m for m in reversed(self.running) if id(m) in self.names), None)
        if found is None:
            return "attend" if self.model is None and self.modules is None else None
        name = self.names[id(found)] or type(found).__name__
        if self.modules is None or any(fnmatchcase(name, glob) for glob in self.modules):
            return name
        self.passed[name] = None
        return None

    def run(self, p: Problem, name: str) -> tuple[Tensor, Tensor]:
        """Computes the call with explicit weights, and keeps its map."""
        pairs = explicit_tiles(p)
        output, lse = join(p, [(result.out, result.lse) for _, result in pairs])
        tiles = []
        for tile, result in pairs:
            if self.grad and result.weights.requires_grad:
                result.weights.retain_grad()
            scores = self.kept(result.scores) if self.scores else None
            tiles.append(
                MapTile(self.kept(result.weights), tile.index or whole(*p.sizes, p.q.device), scores)
            )
        self.keep(name, AttentionMap(name, p.pattern, tiles, self.kept(p.v), self.kept(output)))
        return output, lse

    def keep(self, name: str, found: Any) -> None:
        """The map of one call of a module."""
        calls = 1 + sum(key.partition("#")[0] == name for key in self.maps)
        self.maps[name if calls == 1 else f"{name}#{calls}"] = self.reduce(found) if self.reduce else found

    def kept(self, tensor: Tensor) -> Tensor:
        return tensor if self.grad else tensor.detach()

    def check(self) -> None:
        """Raises where nothing was captured, and says why."""
        if self.maps:
            return
        subject = "the model" if self.root is None else type(self.root).__name__
        if self.passed:
            why = f"modules={list(self.modules or ())} match none of {', '.join(self.passed)}"
        elif self.ran:
            why = "it ran, but none of its modules called zoo.attention.attend"
        else:
            why = "no forward pass of it ran inside the capture"
        raise AttentionError(f"no attention captured of {subject}: {why}")


def _names(model: nn.Module) -> dict[int, str]:
    """Qualified names by identity, without the level that torch.compile adds."""
    return {id(module): _plain(name) for name, module in model.named_modules()}


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


_recorder: _Recorder | None = None


def recorder() -> _Recorder | None:
    """The one that records at present."""
    return _recorder


@contextmanager
def capture(
    model: nn.Module | None = None,
    *,
    modules: Sequence[str] | None = None,
    scores: bool = False,
    grad: bool = False,
    reduce: Callable[[AttentionMap], Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Records the attention maps of every layer that goes through `attend`, with no change to the model.

    Inside, the recorded layers compute explicit weights (the output stays the same to rounding), and compiled
    models run eagerly; one capture at a time in a process.

    Args:
        model: whose modules give the names; without it, the outermost module that is called.
        modules: globs of module names to record, all by default; the others keep their fast kernel.
        scores: also keep the scores before the kernel.
        grad: keep maps in the graph, so that `map.grad` is there after a backward pass; else detached.
        reduce: turns each `AttentionMap` into what is kept, at once: a head mean, one row, ...

    Yields:
        Maps (or what `reduce` made of them) by module name in the order of calls; the second call of one
        module is `name#2`, and so on. A call of `attend` outside of any module is named `attend`. What
        `deformable_attend` did is a `SampledMap`.

    Raises:
        AttentionError: on leaving, if nothing was captured; it says why.

    Example:
        >>> from zoo.attention import attend, capture
        >>> x = torch.randn(1, 2, 5, 4)
        >>> with capture() as maps:
        ...     _ = attend(x, x, x)
        >>> maps["attend"].weights.shape
        torch.Size([1, 2, 5, 5])
    """
    global _recorder
    if _recorder is not None:
        raise AttentionError("a capture is already running; captures do not nest")
    mine = _Recorder(model, modules, scores, grad, reduce)
    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(mine.enter).remove)
        stack.callback(register_module_forward_hook(mine.leave, always_call=True).remove)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        _recorder = mine
        try:
            yield mine.maps
        finally:
            _recorder = None
    mine.check()
