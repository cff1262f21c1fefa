"""The pictures a traffic engineer looks at, each written as a PNG.

Colour-blind readers can tell the colours apart (Okabe and Ito for lines, red-yellow-blue and cividis for
maps). A missing reading is a gap in its line.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from zoo import plots
from zoo.plots import BLUE, GREEN, GREY, PURPLE, SKY, VERMILION, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from domains.traffic.data import TrafficData
    from domains.traffic.task import TrafficTask

MODEL_COLOUR, OTHER_COLOURS = VERMILION, (BLUE, GREEN, PURPLE, SKY, GREY)
STYLE: dict[Any, Any] = (
    plots.STYLE
    | plots.GRID
    | {
        "axes.titleweight": "bold",
        "xtick.color": "#444444",
        "ytick.color": "#444444",
        "lines.solid_capstyle": "round",
    }
)
_canvas = partial(canvas, style=STYLE)
QUANTITIES = {
    "simulated": "speed (mph)",
    "metr_la": "speed (mph)",
    "pems_bay": "speed (mph)",
    "pemsd7_m": "speed (mph)",
} | {f"pems0{i}": "flow (vehicles / 5 min)" for i in (3, 4, 7, 8)}
UNKNOWN = "reading (unit of the data)"
ERRORS = {"mae": "MAE", "rmse": "RMSE", "mape": "MAPE (%)"}


def quantity(data_name: str | None) -> str:
    """What the readings of a data set are, with their unit, as far as the name tells."""
    return QUANTITIES.get(data_name or "", UNKNOWN)


def unit(what: str) -> str:
    """The unit in the brackets of a quantity."""
    return what.partition("(")[2].rstrip(")")


def draw_results(task: TrafficTask, data: TrafficData, results: Mapping[str, Any], folder: Path) -> None:
    """All pictures of a trained model.

    Errors by horizon, the training curve, example forecasts, where sensors have coordinates a map of the test
    error, and for the simulated freeways one day of the most congested one.
    """
    what = quantity(data.name)
    horizon_plot(results["errors"], results["interval_minutes"], folder / "horizon.png", what)
    if (folder.parent / "metrics.csv").is_file():
        training_curve(folder.parent / "metrics.csv", folder / "training.png")
    forecast, truth = _tiled_forecasts(task, data)
    errors = np.ma.masked_invalid(np.abs(forecast - truth)).mean((0, 1)).filled(np.nan)
    window = _liveliest(truth)
    now = int(data.test_set.starts[window * data.horizon]) + data.history
    rows = slice(max(0, now - 3 * data.history), now)
    chosen = _spread_ranks(errors, 4)
    forecast_plot(
        [f"{data.series.sensor_ids[i]}, test MAE {errors[i]:.2f}" for i in chosen],
        data.series.timestamps[rows.start : now + data.horizon],
        np.where(data.test_set.observed[rows], data.test_set.targets[rows], np.nan)[:, chosen],
        forecast[window][:, chosen],
        folder / "forecast.png",
        truth=truth[window][:, chosen],
        what=what,
    )
    if data.graph.coordinates is not None:
        label = f"test MAE ({unit(what)})"
        sensor_map(data.graph.coordinates, errors, folder / "map.png", label, adjacency=data.graph.adjacency)
    if data.name == "simulated":
        _draw_freeway(data, forecast, truth, folder / "space_time.png")


def forecast_plot(
    titles: Sequence[str],
    timestamps: np.ndarray,
    history: np.ndarray,
    forecast: np.ndarray,
    path: str | Path,
    truth: np.ndarray | None = None,
    what: str = UNKNOWN,
) -> None:
    """History, forecast and truth of n sensors, one panel each.

    Args:
        titles: n panel titles.
        timestamps: `[H + Q]` datetime64 of the history and of the horizon behind it.
        history: `[H, n]`, NaN where missing.
        forecast: `[Q, n]`.
        truth: `[Q, n]` as far as it is known, NaN elsewhere.
        what: quantity and unit.
    """
    steps, columns = len(history), min(2, len(titles))
    rows = -(-len(titles) // columns)
    with _canvas(
        path, (4.2 * columns, 0.5 + 2.1 * rows), nrows=rows, ncols=columns, sharex=True, sharey=True
    ) as (fig, axes):
        for i, ax in enumerate(axes.flat):
            if i >= len(titles):
                ax.set_visible(False)
                continue
            ax.set_title(titles[i])
            ax.axvline(timestamps[steps - 1], color=GREY, linewidth=0.8, linestyle=":")
            ax.plot(timestamps[:steps], history[:, i], color=BLUE, label="measured")
            if truth is not None:
                joined = np.concatenate([history[-1:, i], truth[:, i]])
                ax.plot(timestamps[steps - 1 :], joined, color=BLUE, alpha=0.45, label="measured later")
            ax.plot(
                timestamps[steps:],
                forecast[:, i],
                color=VERMILION,
                marker="o",
                markersize=2.5,
                label="forecast",
            )
        _label_time(axes)
        fig.supylabel(what, fontsize=9)
        fig.legend(
            *axes.flat[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False
        )


def horizon_plot(
    errors: Mapping[str, Mapping[str, Sequence[float]]],
    interval_minutes: int,
    path: str | Path,
    what: str = UNKNOWN,
) -> None:
    """MAE, RMSE and MAPE against the forecast horizon.

    Args:
        errors: model or baseline -> `mae`, `rmse`, `mape` of each horizon step; the first name stands out.
    """
    with _canvas(path, (10.5, 3.1), ncols=len(ERRORS)) as (_, axes):
        for ax, (key, title) in zip(axes.flat, ERRORS.items(), strict=True):
            ends = []
            for i, (name, values) in enumerate(errors.items()):
                minutes = interval_minutes * np.arange(1, len(values[key]) + 1)
                colour = MODEL_COLOUR if i == 0 else OTHER_COLOURS[(i - 1) % len(OTHER_COLOURS)]
                ax.plot(
                    minutes,
                    values[key],
                    color=colour,
                    linewidth=2.4 if i == 0 else 1.3,
                    zorder=3 if i == 0 else 2,
                )
                ends.append((values[key][-1], name, colour))
            ax.set_title(title if "%" in title else f"{title} ({unit(what)})")
            ax.set_xlabel("horizon (minutes)")
            ax.set_ylim(bottom=0)
            ax.set_xticks(_round_minutes(minutes))
            if ax is axes.flat[-1]:
                _label_ends(ax, minutes[-1], ends)


def sensor_map(
    coordinates: np.ndarray,
    values: np.ndarray,
    path: str | Path,
    label: str,
    adjacency: np.ndarray | None = None,
    slow_is_bad: bool = False,
) -> None:
    """The sensors where they stand, coloured by a value.

    Args:
        coordinates: `[N, 2]` latitude and longitude.
        values: `[N]`; NaN is drawn as a hollow grey ring.
        label: of the colour bar, with unit.
        adjacency: `[N, N]`; each sensor's strongest edges are drawn thin.
        slow_is_bad: red for low values, as on a map of speeds; else dark for high ones, for errors.
    """
    lat, lon = coordinates.T
    known = np.isfinite(values)
    with _canvas(path, (6.4, 5.4)) as (fig, axes):
        ax = axes.flat[0]
        ax.grid(False)
        if adjacency is not None:
            _draw_edges(ax, lat, lon, adjacency)
        ax.scatter(lon[~known], lat[~known], s=26, facecolors="none", edgecolors=GREY, zorder=3)
        cmap = "RdYlBu" if slow_is_bad else "cividis_r"
        points = ax.scatter(
            lon[known],
            lat[known],
            c=values[known],
            s=34,
            cmap=cmap,
            edgecolors="#333333",
            linewidths=0.4,
            zorder=4,
        )
        _colour_bar(fig, points, ax, label)
        ax.set_aspect(1 / np.cos(np.deg2rad(lat.mean())))
        ax.set(xlabel="longitude (degrees)", ylabel="latitude (degrees)")


def training_curve(metrics: str | Path, path: str | Path) -> None:
    """Training loss and validation error by epoch, from a run's `metrics.csv`; the best epoch is marked."""
    with open(metrics, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with _canvas(path, (5.6, 3.2)) as (_, axes):
        ax = axes.flat[0]
        for key, colour, name in (
            ("train/loss", BLUE, "training loss"),
            ("val/mae", VERMILION, "validation MAE"),
        ):
            points = np.array([(float(r["epoch"]), float(r[key])) for r in rows if r.get(key)]).reshape(-1, 2)
            if not len(points):
                continue
            ax.plot(*points.T, color=colour, marker="o", markersize=3, label=name)
            if key == "val/mae":
                epoch, best = points[points[:, 1].argmin()]
                ax.annotate(
                    f"best {best:.2f}, epoch {epoch:.0f}",
                    (epoch, best),
                    xytext=(0, -14),
                    textcoords="offset points",
                    ha="right" if epoch > len(points) / 2 else "left",
                    color=colour,
                )
        ax.margins(y=0.15)
        ax.set(xlabel="epoch", ylabel="error (unit of the data)")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(frameon=False)


def space_time_plot(
    timestamps: np.ndarray, miles: np.ndarray, speeds: Mapping[str, np.ndarray], path: str | Path
) -> None:
    """Speed along a freeway through time: congestion is a wedge that grows against the traffic.

    Args:
        timestamps: `[T]` datetime64.
        miles: `[n]` positions along the freeway, increasing in the direction of traffic.
        speeds: panel title -> `[T, n]` mph, NaN where missing (grey).
    """
    with _canvas(path, (7.2, 0.5 + 2.2 * len(speeds)), nrows=len(speeds), sharex=True) as (fig, axes):
        for ax, (title, speed) in zip(axes.flat, speeds.items(), strict=True):
            ax.grid(False)
            ax.set_facecolor("#DDDDDD")
            image = ax.pcolormesh(
                timestamps, miles, speed.T, cmap="RdYlBu", vmin=0, vmax=70, shading="nearest"
            )
            ax.set_title(title)
        fig.supylabel("mile in the direction of traffic", fontsize=9)
        _colour_bar(fig, image, axes, "speed (mph)")
        _label_time(axes)


# ---- what to show ------------------------------------------------------------------------------------------


@torch.no_grad()
def _tiled_forecasts(task: TrafficTask, data: TrafficData) -> tuple[np.ndarray, np.ndarray]:
    """Forecasts and truth (NaN where missing), `[W, Q, N]`, of test windows a horizon apart.

    Each step of the test part is so forecast once.
    """
    was_training = task.training
    task.eval()
    parts = []
    for first in range(0, len(data.test_set), data.horizon * 8):
        batch = data.test_set.__getitems__(
            range(first, min(first + data.horizon * 8, len(data.test_set)), data.horizon)
        )
        forecast = task.forecast({key: value.to(task.device) for key, value in batch.items()}).cpu()
        parts.append((forecast, batch["y"].masked_fill(~batch["y_mask"], torch.nan)))
    task.train(was_training)
    forecast, truth = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return forecast, truth


def _liveliest(truth: np.ndarray) -> int:
    """The window in which readings change most, the least of them left out (they are noise)."""
    change = np.abs(truth[:, -1] - truth[:, 0])
    return int(np.nanmean(np.where(change > 5, change, 0), axis=1).argmax())


def _spread_ranks(errors: np.ndarray, count: int) -> list[int]:
    """Sensors from the median error to the worst."""
    order = np.argsort(np.nan_to_num(errors, nan=-1))
    return [int(order[round(q * (len(order) - 1))]) for q in np.linspace(0.5, 1, min(count, len(order)))]


def _draw_freeway(data: TrafficData, forecast: np.ndarray, truth: np.ndarray, path: Path) -> None:
    """The last test day of the slowest simulated freeway, whose sensor ids are `freeway-mile`."""
    names, miles = np.array([sensor.rsplit("-", 1) for sensor in data.series.sensor_ids]).T
    slowest = min(np.unique(names), key=lambda name: np.nanmean(truth[:, :, names == name]))
    windows = -(-data.steps_per_day // data.horizon)
    on_it, recent = names == slowest, slice(-windows, None)
    interval = data.series.interval_minutes
    tiles = {"measured": truth, f"forecast {interval} to {interval * data.horizon} minutes ahead": forecast}
    first = data.test_set.starts[:: data.horizon][recent].numpy() + data.history
    rows = (first[:, None] + np.arange(data.horizon)).ravel()
    speeds = {
        f"{slowest} {title}": values[recent][:, :, on_it].reshape(-1, on_it.sum())
        for title, values in tiles.items()
    }
    space_time_plot(data.series.timestamps[rows], miles[on_it].astype(float), speeds, path)


# ---- drawing -----------------------------------------------------------------------------------------------


def _colour_bar(figure: Figure, mappable: Any, axes: Any, label: str) -> None:
    bar = figure.colorbar(mappable, ax=axes, label=label, shrink=0.8, pad=0.02)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def _label_time(axes: np.ndarray) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    for ax in axes.flat:
        locator = AutoDateLocator(minticks=3, maxticks=7)
        ax.xaxis.set_major_locator(locator)
        ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def _label_ends(ax: Axes, x: float, ends: list[tuple[float, str, str]]) -> None:
    """Write names behind the last points of their lines, pushed apart where they would overlap."""
    low, high = ax.get_ylim()
    place = -np.inf
    for y, name, colour in sorted(ends):
        place = max(y, place + 0.07 * (high - low))
        ax.annotate(
            name,
            (x, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            annotation_clip=False,
        )


def _round_minutes(minutes: np.ndarray) -> np.ndarray:
    """At most five ticks, the last horizon among them."""
    stride = max(1, -(-len(minutes) // 5))
    return minutes[len(minutes) - 1 :: -stride][::-1]


def _draw_edges(ax: Axes, lat: np.ndarray, lon: np.ndarray, adjacency: np.ndarray, most: int = 3) -> None:
    """The `most` strongest edges from each sensor."""
    from matplotlib.collections import LineCollection

    weights = adjacency - np.diag(np.diag(adjacency))
    nearest = np.argsort(weights, axis=1)[:, -most:]
    rows = np.arange(len(weights))[:, None]
    start, column = np.nonzero(weights[rows, nearest] > 0)
    end = nearest[start, column]
    places = np.stack([lon, lat], axis=1)
    lines = np.stack([places[start], places[end]], axis=1)
    ax.add_collection(LineCollection(list(lines), colors="#B8B8B8", linewidths=0.6, zorder=1))
