"""`zoo bench suite=attention`: quick runs from the command line, the record, tables, the layers it finds."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner

from zoo.attention import AttentionError
from zoo.attention.layers import LAYERS, AttentionLayer, Supports
from zoo.attention.layers.base import Inputs
from zoo.bench import mechanisms
from zoo.bench.mechanisms import PARTS, QUICK, QUICK_TASKS
from zoo.bench.mechanisms.contestants import ARGUMENTS, VARIANTS, Contestant, contestants, lacking
from zoo.bench.mechanisms.cost import Limits, build, grown, patterns
from zoo.bench.mechanisms.domains import overrides, swapped
from zoo.bench.mechanisms.record import Cost, LeftOut, Record, Swapped, Trained, opened
from zoo.bench.mechanisms.report import Found
from zoo.bench.report import Curve, Point
from zoo.bench.synthetic import Task
from zoo.bench.synthetic.train import Budget, Learned, learned
from zoo.cli.bench import app
from zoo.errors import ConfigError, UnknownName, ZooError

CPU = torch.device("cpu")
RUN = ["suite=attention", "quick=true", "threads=1", "repeats=1", "device=cpu"]


def trained(name: str, task: str = "mqar", accuracies: tuple[float, ...] = (0.5,), **tests: float) -> Trained:
    each = tuple(tests for _ in accuracies)
    seconds = tuple(1.0 for _ in accuracies)
    seeds = tuple(range(len(accuracies)))
    return Trained(name, seeds, task, True, {}, {"length": 8}, {}, 0.25, 10, accuracies, each, seconds)


def cost(name: str, pattern: str, sizes: tuple[int, ...] = (256, 1024), power: int = 1) -> Cost:
    points = tuple(Point(n, 1e-6 * n**power, 1000 * n) for n in sizes)
    return Cost(name, pattern, {"name": name}, Curve(name, points))


def test_a_quick_run_writes_record_tables_and_pictures(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    chosen = ["only=[linear,neighbourhood]", "tasks=[mqar,needle,cost]"]
    result = CliRunner().invoke(app, [*RUN, *chosen, f"output={path}", f"picture={tmp_path / 'drawn'}"])
    assert result.exit_code == 0, result.output
    stored = json.loads(path.read_text())
    tasks = {(entry["name"], entry["task"]) for entry in stored["trained"]}
    assert tasks == {(name, task) for name in ("linear", "neighbourhood") for task in ("mqar", "needle")}
    assert {(e["name"], e["pattern"]) for e in stored["costs"] if e["name"] == "linear"} == {
        ("linear", pattern) for pattern in ("NS", "CS", "NC", "CC")
    }
    assert [point["size"] for point in stored["costs"][0]["curve"]["points"]] == [64, 256]
    assert "## Accuracy on synthetic tasks" in path.with_suffix(".md").read_text()
    assert Image.open(tmp_path / "drawn_accuracy.png").width > 500
    assert Image.open(tmp_path / "drawn_cost.png").width > 500


def test_a_further_run_adds_to_the_record(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    for chosen in (["only=linear", "tasks=[mqar]"], ["only=multihead", "tasks=[mqar]", "seeds=2"]):
        result = CliRunner().invoke(app, [*RUN, *chosen, f"output={path}"])
        assert result.exit_code == 0, result.output
    stored = json.loads(path.read_text())
    assert [(entry["name"], len(entry["accuracies"])) for entry in stored["trained"]] == [
        ("linear", 1),
        ("multihead", 2),
    ]
    assert len(stored["machines"]) == 2
    assert "multihead" in result.output
    assert "linear" in result.output


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded is not done again: not a seed, not a size of a curve; all of it is with `again`."""
    path = tmp_path / "found.json"
    seeds: list[int] = []
    sizes: list[int] = []

    def counted(attention: Any, task: Task, budget: Budget, *, seed: int, device: torch.device) -> Learned:
        seeds.append(seed)
        return learned(attention, task, budget, seed=seed, device=device)

    def scaled(name: str, at: Any, wanted: list[int], **given: Any) -> Curve:
        sizes.extend(wanted)
        return Curve(name, tuple(Point(n, 0.01, n) for n in wanted))

    monkeypatch.setattr(mechanisms, "learned", counted)
    monkeypatch.setattr("zoo.bench.mechanisms.cost.scaling", scaled)
    chosen = ["only=gla", "tasks=[mqar,cost]", f"output={path}"]
    for further in (["seeds=1"], ["seeds=3"], ["seeds=3"], ["seeds=2", "again=true"]):
        result = CliRunner().invoke(app, [*RUN, *chosen, *further])
        assert result.exit_code == 0, result.output
    assert seeds == [0, 1, 2, 0, 1]
    assert sizes == [64, 256, 64, 256]
    entry = opened(path, quick=True).trained["gla", "mqar"]
    assert sorted(entry.seeds) == [0, 1, 2]
    assert len(entry.accuracies) == len(entry.tests) == len(entry.seconds) == 3


def test_seeds_of_another_size_are_not_mixed_in() -> None:
    record = Record(quick=False)
    record.add(trained("a", accuracies=(0.5, 0.7)))
    record.add(dataclasses.replace(trained("a", accuracies=(0.9,)), seeds=(1,)))
    assert record.trained["a", "mqar"].accuracies == (0.5, 0.9)
    record.add(dataclasses.replace(trained("a", accuracies=(0.1,)), sizes={"length": 16}))
    assert record.trained["a", "mqar"].accuracies == (0.1,)


def test_a_model_of_a_domain_is_trained_by_the_seeds_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training with other overrides takes their place."""
    path = tmp_path / "found.json"

    def counted(name: str, attention: Any, domain: str, *, quick: bool, seed: int) -> Swapped:
        seeds.append(seed)
        return Swapped(name, (seed,), domain, "m", overrides(attention, domain, quick=quick), (float(seed),))

    monkeypatch.setattr(mechanisms, "swapped", counted)
    record, seeds = Record(quick=True), list[int]()
    record.add(Swapped("linear", (0, 1), "traffic", "m", ("other",), (5.0, 5.0)))
    record.write(path)
    for count in (1, 3):
        chosen = ["only=linear", "tasks=[traffic]", f"seeds={count}", f"output={path}"]
        result = CliRunner().invoke(app, [*RUN, *chosen])
        assert result.exit_code == 0, result.output
    assert seeds == [0, 1, 2]
    assert opened(path, quick=True).swapped["linear", "traffic"].values == (0.0, 1.0, 2.0)
    assert "1.000±1.000" in result.output


def test_what_a_layer_cannot_do_is_told_in_the_table(tmp_path: Path) -> None:
    chosen = ["only=deltanet_negative", "tasks=[traffic]", f"output={tmp_path / 'found.json'}"]
    result = CliRunner().invoke(app, [*RUN, *chosen])
    assert result.exit_code == 0, result.output
    assert "Not compared" in result.output
    assert "synthetic tasks only" in result.output


@pytest.mark.parametrize("domain", ["vision", "detection"])
def test_a_model_of_a_domain_is_trained_with_another_attention(domain: str) -> None:
    found = swapped("local", Contestant("local").both_ways(), domain, quick=True, seed=0)
    assert 0 <= found.values[0] <= 100
    assert "model.attention.window=9" in found.overrides


def test_an_attention_that_a_model_cannot_take_is_told() -> None:
    """A window in a row of atoms would depend on their order."""
    with pytest.raises(ZooError, match="depends on the order"):
        swapped("local", Contestant("local").both_ways(), "atoms", quick=True, seed=0)


@pytest.mark.parametrize(
    ("overrides", "kind", "message"),
    [
        (["tasks=[mqqar]"], ConfigError, "no task 'mqqar' in suite=attention. Did you mean 'mqar'"),
        (["only=multihed"], UnknownName, "No attention compared is like 'multihed'"),
    ],
)
def test_mistakes_are_named(overrides: list[str], kind: type[Exception], message: str) -> None:
    result = CliRunner().invoke(app, [*RUN, *overrides])
    assert isinstance(result.exception, kind)
    assert message in str(result.exception)


def test_a_record_of_another_kind_is_not_added_to(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    Record(quick=True).write(path)
    with pytest.raises(ConfigError, match="a quick run, which this one cannot add to"):
        opened(path, quick=False)
    path.write_text('{"title": "suite primitives"}')
    with pytest.raises(ConfigError, match="no record of suite=attention"):
        opened(path, quick=False)
    path.write_bytes(b"\xff\x00")
    with pytest.raises(ConfigError, match="no record of suite=attention"):
        opened(path, quick=False)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = Record(quick=False, machines=[{"cpu": "x"}])
    entries = (
        trained("a", "needle", (0.5, 0.7), **{"64 at 0.00": 0.25}),
        dataclasses.replace(cost("a", "NS"), ends="too long"),
        Swapped("a", (0, 3), "traffic", "MAE", ("data.weeks=1",), (3.5, 3.25)),
        LeftOut("b", "mqar", "cannot"),
    )
    for entry in entries:
        record.add(entry)
    record.write(tmp_path / "x.json")
    assert opened(tmp_path / "x.json", quick=False) == record


def test_what_has_been_compared_is_no_longer_left_out() -> None:
    record = Record(quick=False)
    for part in ("NS", "cost", "mqar"):
        record.add(LeftOut("a", part, "cannot"))
    record.add(cost("a", "NS"))
    assert list(record.left_out) == [("a", "mqar")]


# ---- layers ------------------------------------------------------------------------------------------------


def test_every_layer_of_the_zoo_has_what_it_needs() -> None:
    assert {name: needed for name in LAYERS if (needed := lacking(Contestant(name)))} == {}
    assert ARGUMENTS.keys() <= {*LAYERS, *VARIANTS}


@pytest.mark.parametrize("name", [contestant.name for contestant in contestants()])
def test_every_layer_is_trained_on_rows_of_tokens(name: str) -> None:
    found = learned(Contestant(name).short(), QUICK_TASKS["mqar"], QUICK)
    assert 0 <= found.accuracy <= 1
    assert found.parameters > 1000


@pytest.mark.parametrize("name", [contestant.name for contestant in contestants()])
def test_every_layer_is_measured_in_the_patterns_it_does(name: str) -> None:
    attention = Contestant(name).long()
    can = LAYERS[Contestant(name).layer].supports
    found = patterns(attention)
    assert ("NS" in found, "CS" in found, "NC" in found) == (can.bidirectional, can.causal, can.cross)
    for pattern in found:
        layer = build(attention, pattern, CPU)
        x = torch.randn(1, 64, 64)
        assert layer(x, torch.randn(1, 64, 64) if pattern in ("NC", "CC") else None).shape == x.shape


def test_a_name_means_that_layer_alone_and_a_part_all_like_it() -> None:
    assert [c.name for c in contestants(["moh"])] == ["moh"]
    assert [c.name for c in contestants(["delt", "linear"])] == [
        "deltanet",
        "deltanet_negative",
        "gated_deltanet",
        "linear",
    ]
    assert {c.name for c in contestants()} == {*LAYERS, *VARIANTS}


class _Pooled(AttentionLayer):
    """Adds the mean over all queries, as a mechanism with landmarks of the queries would."""

    supports = Supports(bidirectional=True, cross=True)

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.dim, self.proj = dim, nn.Linear(dim, dim)

    def mix(self, given: Inputs) -> Tensor:
        assert given.context is not None
        return self.proj(given.x + given.x.mean(1, keepdim=True) + given.context.mean(1, keepdim=True))


def test_causal_cross_needs_queries_that_stand_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYERS, "pooled", _Pooled)
    assert patterns({"name": "pooled"}) == ["NS", "NC"]
    assert patterns({"name": "multihead"}) == ["NS", "CS", "NC", "CC"]


def test_a_curve_ends_where_the_next_size_would_take_too_much() -> None:
    limits = Limits((256, 1024, 4096), seconds=1.0, bytes=10_000)
    assert not limits.forbids(None, 256)
    assert not limits.forbids(Point(256, 0.06, 100), 1024)
    assert limits.forbids(Point(256, 0.125, 100), 1024) == "1,024 tokens may take 2 s, over 1 s"
    assert "GiB" in limits.forbids(Point(256, 0.01, 1000), 1024)
    curve, ends = grown("x", {"name": "multihead"}, "CS", Limits((16, 32, 1024), bytes=2**20), 1, CPU)
    assert [point.size for point in curve.points] == [16, 32]
    assert ends.startswith("1,024 tokens may take 0.")


def test_a_curve_goes_on_from_what_is_known() -> None:
    known = (Point(16, 123.0, 456), Point(32, 0.001, 789))
    attention = {"name": "multihead"}
    curve, ends = grown("x", attention, "CS", Limits((16, 32, 64)), 1, CPU, known)
    assert curve.points[:2] == known
    assert curve.points[2].size == 64
    assert not ends


def test_a_long_call_is_measured_once_with_the_same_memory() -> None:
    sizes = (256, 1024)
    slow = (Point(256, 0.5, 1),)
    curve, _ = grown("x", {"name": "linear"}, "CS", Limits(sizes), 2, CPU, slow)
    twice, _ = grown("x", {"name": "linear"}, "CS", Limits(sizes), 2, CPU)
    assert curve.points[1].bytes == pytest.approx(twice.points[1].bytes, rel=0.02)
    assert 0 < curve.points[1].seconds < 1


def test_a_layer_without_a_needed_argument_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ARGUMENTS, "mla")
    assert lacking(Contestant("mla")) == ["kv_rank"]
    with pytest.raises(AttentionError, match="kv_rank"):
        learned(Contestant("mla").short(), QUICK_TASKS["mqar"], QUICK)


# ---- tables ------------------------------------------------------------------------------------------------


def full_record() -> Record:
    record = Record(quick=False)
    for name in ("multihead", "deltanet_negative", "linear"):
        for task in QUICK_TASKS:
            lengths = {"64": 1.0, "256": 0.5, "1,024": 0.25, "4,096": 0.125}
            grid = {f"{n} at {d:.2f}": 0.5 for n in (64, 256, "1,024") for d in (0.0, 0.5, 1.0)}
            tests = grid if task == "needle" else lengths if task in ("induction", "parity") else {}
            record.add(trained(name, task, (0.9, 1.0), **tests))
        for pattern in ("NS", "CS", "NC", "CC"):
            sizes = (1024, 4096) if name == "multihead" else (4096, 16_384)
            record.add(cost(name, pattern, sizes, 2))
        for domain in ("traffic", "forecasting", "vision", "superres"):
            record.add(Swapped(name, (0, 1), domain, "measured, %", (), (12.3456, 12.5)))
    record.add(LeftOut("moh_aggregated", "traffic", "a long reason, told in full " * 8))
    return record


def test_tables_are_whole_at_100_columns() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(Found(full_record()))
    text = console.export_text()
    assert "…" not in text
    costs = ("268.44 s N^2.0", "(4k) 16.78 s N^2.0")
    for word in (*costs, "95.0±5.0", "100", "50/50/50", "12.423±0.077", "guessing", "in full"):
        assert word in text


def test_the_accuracy_table_has_the_best_first_and_guessing_last() -> None:
    record = Record(quick=False)
    for name, accuracy in (("linear", 0.3), ("multihead", 0.9), ("local", 0.5)):
        record.add(trained(name, "mqar", (accuracy,)))
    rows = Found(record).sheets()[0].rows
    assert [row[0] for row in rows] == ["multihead", "local", "linear", "guessing"]
    assert [row[1] for row in rows] == ["90.0", "50.0", "30.0", "25.0"]


def test_parts_are_the_tasks_the_cost_and_the_domains() -> None:
    assert (
        *("mqar", "mqar_small", "selective_copy", "induction", "needle", "listops", "parity"),
        "cost",
        *("traffic", "forecasting", "vision", "superres", "atoms", "detection"),
    ) == PARTS
