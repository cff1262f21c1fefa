"""Every picture is a PNG of the right content; whether it is good to look at, a person has to say."""

from __future__ import annotations

from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest

from domains.traffic import plots
from zoo.errors import ZooError

CLOCK = np.datetime64("2024-01-04T07:00", "s") + np.arange(36) * np.timedelta64(300, "s")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """The figures saved, to look into."""
    figures: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig

    def savefig(self: matplotlib.figure.Figure, *args: object, **options: object) -> None:
        figures.append(self)
        save(self, *args, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return figures


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_missing_reading_is_a_gap_in_the_line_of_the_forecast_plot(tmp_path: Path, drawn: list) -> None:
    history, forecast = np.full((24, 3), 60.0), np.full((12, 3), 55.0)
    history[5, 1] = np.nan
    titles = ["a", "b", "c"]
    plots.forecast_plot(titles, CLOCK, history, forecast, tmp_path / "f.png", truth=forecast + 1)
    panels = drawn[0].axes
    measured = panels[1].lines[1]
    assert [panel.get_title(loc="left") for panel in panels[:3]] == titles
    assert np.isnan(measured.get_ydata()[5])
    assert np.isfinite(np.delete(measured.get_ydata(), 5)).all()
    assert not panels[3].get_visible()
    assert is_png(tmp_path / "f.png")


def test_the_forecast_begins_one_step_after_the_history(tmp_path: Path, drawn: list) -> None:
    plots.forecast_plot(["a"], CLOCK, np.ones((24, 1)), np.ones((12, 1)), tmp_path / "f.png")
    _, measured, forecast = drawn[0].axes[0].lines
    assert measured.get_xdata()[-1] == CLOCK[23]
    assert forecast.get_xdata()[0] == CLOCK[24]


def test_the_horizon_plot_has_a_line_for_each_forecaster_and_metric(tmp_path: Path, drawn: list) -> None:
    errors = {
        name: {key: [1.0, 2.0, 3.0] for key in ("mae", "rmse", "mape")} for name in ("gman", "last value")
    }
    plots.horizon_plot(errors, 15, tmp_path / "h.png", "speed (mph)")
    panels = drawn[0].axes
    assert [panel.get_title(loc="left") for panel in panels] == ["MAE (mph)", "RMSE (mph)", "MAPE (%)"]
    assert all(len(panel.lines) == 2 and list(panel.lines[0].get_xdata()) == [15, 30, 45] for panel in panels)


def test_labels_at_the_ends_of_equal_lines_do_not_overlap(tmp_path: Path, drawn: list) -> None:
    errors = {name: {key: [1.0, 2.0] for key in ("mae", "rmse", "mape")} for name in "abc"}
    plots.horizon_plot(errors, 5, tmp_path / "h.png")
    labels = [text.get_window_extent() for text in drawn[0].axes[-1].texts]
    assert len(labels) == 3
    assert not any(a.overlaps(b) for i, a in enumerate(labels) for b in labels[:i])


def test_sensors_without_a_value_are_hollow_on_the_map(tmp_path: Path, drawn: list) -> None:
    coordinates = np.array([[34.0, -118.2], [34.1, -118.3], [34.2, -118.1]])
    values = np.array([1.0, np.nan, 3.0])
    adjacency = np.array([[1, 0.5, 0], [0, 1, 0.5], [0, 0, 1]], dtype=np.float32)
    plots.sensor_map(coordinates, values, tmp_path / "m.png", "MAE (mph)", adjacency=adjacency)
    edges, hollow, filled = drawn[0].axes[0].collections
    assert len(edges.get_segments()) == 2
    assert hollow.get_offsets().tolist() == [[-118.3, 34.1]]
    assert filled.get_array().tolist() == [1, 3]


def test_the_training_curve_marks_the_best_epoch(tmp_path: Path, drawn: list) -> None:
    rows = [
        "epoch,step,lr,train/loss,val/mae",
        "1,10,0.1,5.0,4.0",
        "2,20,0.1,4.0,3.5",
        "3,30,0.1,3.0,",
        "4,40,0.1,3,3.7",
    ]
    (tmp_path / "metrics.csv").write_text("\n".join(rows))
    plots.training_curve(tmp_path / "metrics.csv", tmp_path / "t.png")
    training, validation = drawn[0].axes[0].lines
    assert list(training.get_xdata()) == [1, 2, 3, 4]
    assert list(validation.get_xdata()) == [1, 2, 4]
    assert drawn[0].axes[0].texts[0].get_text() == "best 3.50, epoch 2"


def test_the_space_time_plot_has_a_panel_for_each_field_on_one_scale(tmp_path: Path, drawn: list) -> None:
    speed = np.full((36, 5), 60.0)
    plots.space_time_plot(
        CLOCK, np.arange(5.0), {"measured": speed, "forecast": speed - 50}, tmp_path / "s.png"
    )
    measured, forecast = (panel.collections[0] for panel in drawn[0].axes[:2])
    assert measured.get_clim() == forecast.get_clim() == (0, 70)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ZooError, match=r"Cannot write .*file/f.png"):
        plots.forecast_plot(["a"], CLOCK, np.ones((24, 1)), np.ones((12, 1)), tmp_path / "file" / "f.png")
