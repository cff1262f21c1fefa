"""Tables of a comparison: in the terminal at 100 columns, and as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from zoo.bench.growth import in_words, late_slopes, markdown
from zoo.bench.mechanisms.cost import PATTERNS
from zoo.bench.mechanisms.pictures import draw_accuracy, draw_cost
from zoo.bench.mechanisms.record import Cost, Record, Swapped, Trained
from zoo.bench.synthetic import TASKS
from zoo.files import atomic_write


@dataclass(frozen=True)
class Sheet:
    """A table of words; a cell may have two lines."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    prose: bool = False
    """The columns are text, not figures."""

    def markdown(self) -> str:
        headings, *rows = ([cell.replace("\n", ", ") for cell in row] for row in (self.headings, *self.rows))
        caption = f"\n{self.caption}\n" if self.caption else ""
        left = len(headings) if self.prose else 1
        return f"## {self.title}\n\n{markdown(headings, rows, left=left)}{caption}"

    def __rich__(self) -> Table:
        table = Table(title=self.title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), min_width=70)
        table.caption = self.caption or None
        for i, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if i and not self.prose else "left", no_wrap=i == 0)
        for row in self.rows:
            table.add_row(*row)
        return table


@dataclass(frozen=True)
class Found:
    """What `zoo bench suite=attention` shows and writes: all that the record at its output holds."""

    record: Record
    picture: str | None = None
    """Where pictures are drawn: `PICTURE_accuracy.png`, `PICTURE_cost.png`; None = beside the record."""

    def write(self, path: Path) -> None:
        """The record, its tables as Markdown, and pictures of accuracy and cost."""
        self.record.write(path)
        with atomic_write(path.with_suffix(".md"), "w") as file:
            file.write(self.markdown())
        stem = Path(self.picture).with_suffix("") if self.picture else path.with_suffix("")
        if self.record.trained:
            draw_accuracy(self.record, stem.with_name(f"{stem.name}_accuracy.png"))
        if self.record.costs:
            draw_cost(self.record, stem.with_name(f"{stem.name}_cost.png"))

    def markdown(self) -> str:
        """All tables."""
        return "\n".join(sheet.markdown() for sheet in self.sheets())

    def sheets(self) -> list[Sheet]:
        made = [accuracy_sheet(self.record), *further_sheets(self.record), cost_sheet(self.record)]
        made += [domain_sheet(self.record), ends_sheet(self.record), left_out_sheet(self.record)]
        return [sheet for sheet in made if sheet.rows]

    def __rich__(self) -> RenderableType:
        return Group(*self.sheets())


def accuracy_sheet(record: Record) -> Sheet:
    """Layers by tasks, those that most were trained on first, and the best on the first one first; below, the
    scores of guessing."""
    counts = Counter(task for _, task in record.trained)
    tasks = sorted((name for name in TASKS if counts[name]), key=lambda name: -counts[name])
    names = dict.fromkeys(name for name, _ in record.trained)

    def key(name: str) -> list[float]:
        return [-entry.accuracy if (entry := record.trained.get((name, task))) else 1.0 for task in tasks]

    rows = [
        [_named(name, record), *(_accuracy(record.trained.get((name, task))) for task in tasks)]
        for name in sorted(names, key=key)
    ]
    chances = [next(e.chance for e in record.trained.values() if e.task == task) for task in tasks]
    guessing = [["guessing", *(_percent(chance) for chance in chances)]] if rows else []
    caption = f"percent; {_seeds(record.trained.values())}; *: sees later tokens, too"
    return Sheet("Accuracy on synthetic tasks", ["attention", *tasks], rows + guessing, caption)


def _seeds(entries: Iterable[Trained | Swapped]) -> str:
    """How many seeds stand behind the figures of each task."""
    counts: dict[str, set[int]] = {}
    for entry in entries:
        counts.setdefault(entry.part, set()).add(len(entry.seeds))
    told = [f"{task} {'-'.join(map(str, sorted(n)))}" for task, n in counts.items()]
    return f"mean over seeds, ± half of their range (seeds: {', '.join(told)})"


def _named(name: str, record: Record) -> str:
    causal = all(entry.causal for entry in record.trained.values() if entry.name == name)
    return name if causal else f"{name} *"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _accuracy(entry: Trained | None) -> str:
    return "" if entry is None else _spread([100 * share for share in entry.accuracies], 1)


def _spread(values: Sequence[float], digits: int) -> str:
    """Their mean, and half of their range where there are several."""
    half = (max(values) - min(values)) / 2
    return f"{fmean(values):.{digits}f}" + (f"±{half:.{digits}f}" if len(values) > 1 else "")


def further_sheets(record: Record) -> list[Sheet]:
    """Of each task with further tests: other lengths, or a grid of lengths and depths."""
    return [_further(task, record) for task in TASKS if TASKS[task].tests()]


def _further(task: str, record: Record) -> Sheet:
    entries = sorted(
        (entry for entry in record.trained.values() if entry.task == task),
        key=lambda entry: [-value for value in entry.tested().values()],
    )
    groups: dict[str, list[str]] = {}
    for test in entries[0].tests[0] if entries else ():
        groups.setdefault(test.partition(" at ")[0], []).append(test)
    rows = [
        [entry.name, *(_percents(entry.tested(), tests) for tests in groups.values())] for entry in entries
    ]
    depths = [test.partition(" at ")[2] for test in next(iter(groups.values()), []) if " at " in test]
    caption = f"percent at {'the depths ' + '/'.join(depths) + ' of ' if depths else ''}each length"
    trained = entries[0].sizes["length"] if entries else ""
    return Sheet(f"{task}, trained at {trained} tokens", ["attention", *groups], rows, caption)


def _percents(tested: Mapping[str, float], names: Sequence[str]) -> str:
    return "/".join(f"{100 * tested[name]:.0f}" for name in names)


def cost_sheet(record: Record) -> Sheet:
    """Layers by patterns: time and memory at the largest size, and how they grow."""
    names = sorted({name for name, _ in record.costs})
    largest = max((p.size for cost in record.costs.values() for p in cost.curve.points), default=0)
    rows = [[name, *(_cost(record.costs.get((name, p)), largest) for p in PATTERNS)] for name in names]
    headings = ["attention", *PATTERNS.values()]
    caption = (
        f"forward and backward of one row of {largest:,} tokens, 4 heads of 16 channels, and growth over the "
        "last two sizes; in brackets the tokens where that is fewer"
    )
    return Sheet("Time and peak memory", headings, rows, caption)


def _cost(cost: Cost | None, largest: int) -> str:
    if cost is None:
        return ""
    last = cost.curve.points[-1]
    at = "" if last.size == largest else f"({_short(last.size)}) "
    slopes = late_slopes(cost.curve)
    growth = [""] * 2 if slopes is None else [f" N^{round(slope, 1) + 0.0}" for slope in slopes]
    time, memory = in_words(last)
    return f"{at}{time}{growth[0]}\n{memory}{growth[1]}"


def _short(size: int) -> str:
    return f"{size // 1024}k" if size % 1024 == 0 else str(size)


def domain_sheet(record: Record) -> Sheet:
    """Layers by domains."""
    measures = dict.fromkeys(f"{entry.domain}\n{entry.measure}" for entry in record.swapped.values())
    names = sorted({name for name, _ in record.swapped})
    found = {(e.name, f"{e.domain}\n{e.measure}"): _spread(e.values, 3) for e in record.swapped.values()}
    rows = [[name, *(found.get((name, measure), "") for measure in measures)] for name in names]
    return Sheet("One task of each domain", ["attention", *measures], rows, _seeds(record.swapped.values()))


def ends_sheet(record: Record) -> Sheet:
    """Why curves of cost end before the largest size; causal cross attention is the noncausal computation."""
    rows = [
        [cost.name, PATTERNS[cost.pattern], cost.ends]
        for cost in record.costs.values()
        if cost.ends and cost.pattern != "CC"
    ]
    return Sheet("Not measured", ["attention", "pattern", "reason"], sorted(rows), prose=True)


def left_out_sheet(record: Record) -> Sheet:
    rows = [[entry.name, entry.part, entry.reason] for entry in record.left_out.values()]
    return Sheet("Not compared", ["attention", "part", "reason"], rows, prose=True)
