"""`zoo data`: make the embedded data, look into files, convert them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from zoo.cli.console import console, parsed_options
from zoo.registry import get_domain

data_app = typer.Typer(no_args_is_help=True)
app = data_app

DomainName = Annotated[str, typer.Option(help="the domain whose formats these are")]
Options = Annotated[
    list[str] | None,
    typer.Argument(help="how to read the file, as in the config group `data`: key=speed gaps=fill ..."),
]


@data_app.callback()
def data() -> None:
    """Data files: make the embedded ones, look into others, convert them.

    Examples:

      zoo data make traffic --output DIR --weeks 8 --seed 1

      zoo data info metr-la.h5

      zoo data convert metr-la.h5 metr-la.parquet

      zoo data degrade originals small scale=4
    """


@data_app.command()
def make(
    domain: Annotated[str, typer.Argument(help="the domain whose embedded data to make")],
    output: Annotated[Path | None, typer.Option(help="folder for the files; the cache without one")] = None,
    weeks: Annotated[int | None, typer.Option(help="length of the simulation")] = None,
    seed: Annotated[int, typer.Option(help="another seed is another set of roads and days")] = 0,
) -> None:
    """Simulate the embedded data of a domain and print where the files are.

    Examples:

      zoo data make traffic

      zoo data make traffic --output my-data --weeks 8 --seed 1

      zoo data make forecasting/ranking --output my-data
    """
    length = {} if weeks is None else {"weeks": weeks}
    for path in get_domain(domain).load("data").make(output, seed=seed, **length):
        console.print(str(path), soft_wrap=True, highlight=False)


@data_app.command()
def info(file: Path, options: Options = None, domain: DomainName = "traffic") -> None:
    """Say what is in a data file or folder: size, period, statistics, what is missing.

    Examples:

      zoo data info metr-la.h5

      zoo data info flow.npz start=2018-01-01 interval_minutes=5
    """
    facts, statistics = get_domain(domain).load("data").describe(file, **parsed_options(options, "key=speed"))
    summary = Table(show_header=False, box=None)
    for name, value in facts.items():
        summary.add_row(name, value)
    console.print(summary)
    table = Table(*statistics[0])
    for row in statistics:
        table.add_row(*row.values())
    console.print(table)


@data_app.command()
def convert(source: Path, target: Path, options: Options = None, domain: DomainName = "traffic") -> None:
    """Read a data file of any format and write it as h5, npz, csv or parquet, by the suffix of TARGET.

    Examples:

      zoo data convert PEMS04.npz flow.parquet

      zoo data convert readings.csv readings.h5 gaps=fill
    """
    get_domain(domain).load("data").convert(source, target, **parsed_options(options, "key=speed"))
    console.print(str(target), soft_wrap=True, highlight=False)


@data_app.command()
def degrade(source: Path, target: Path, options: Options = None, domain: DomainName = "superres") -> None:
    """Make the low-resolution pictures of a folder by MATLAB's bicubic rule, as those of the benchmarks.

    Writes TARGET/X2/NAMEx2.png and so on; options: scale=4 or scale=[2,3], name={stem}.

    Examples:

      zoo data degrade DIV2K_train_HR DIV2K_train_LR_bicubic

      zoo data degrade photo.png small scale=4
    """
    for path in (
        get_domain(domain).load("data").degrade(source, target, **parsed_options(options, "key=speed"))
    ):
        console.print(str(path), soft_wrap=True, highlight=False)
