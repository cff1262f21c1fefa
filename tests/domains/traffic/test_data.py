"""Splits, scaling, windows and batches."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from domains.traffic.data import TrafficData, longest_run
from domains.traffic.formats import write_series
from domains.traffic.preprocessing import Preprocessing, stand_ins
from domains.traffic.series import TrafficSeries, regular_clock
from domains.traffic.windows import Windows, history_counts, split_rows, window_starts
from zoo.errors import ConfigError

STEPS, SENSORS = 200, 5


def make_series(
    steps: int = STEPS, sensors: int = SENSORS, channels: int = 1, missing: float = 0.0
) -> TrafficSeries:
    rng = np.random.default_rng(0)
    values = rng.uniform(5, 70, (steps, sensors, channels)).astype(np.float32)
    values[rng.random(values.shape) < missing] = 0
    ids, names = [f"s{i}" for i in range(sensors)], ["speed", "flow", "occupancy"][:channels]
    return TrafficSeries(values, regular_clock("2024-01-03", steps, 5), ids, 5, names)


def make_data(folder: Path, series: TrafficSeries | None = None, **options) -> TrafficData:
    write_series(series or make_series(), folder / "series.npz")
    data = TrafficData("test", folder / "series.npz", **options)
    data.setup()
    return data


# ---- splits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(2016, (1411, 202, 403)), (34272, (23990, 3428, 6854)), (52116, (36481, 5212, 10423))],
)
def test_parts_are_rounded_as_gman_does(rows: int, expected: tuple[int, ...]) -> None:
    parts = split_rows(rows, 12, 12, (0.7, 0.1, 0.2), "inside")
    assert tuple(end - begin for begin, end in parts.values()) == expected
    assert [parts["train"][0], parts["val"][0], parts["test"][0], parts["test"][1]] == [
        0,
        expected[0],
        expected[0] + expected[1],
        rows,
    ]


def test_windows_across_are_the_list_of_all_windows_cut_in_three() -> None:
    parts = split_rows(34272, 12, 12, (0.7, 0.1, 0.2), "across")
    starts = [window_starts(rows, 24, np.array([], dtype=int)) for rows in parts.values()]
    assert [len(s) for s in starts] == [23974, 3425, 6850]  # DCRNN's METR-LA: 34249 windows
    np.testing.assert_array_equal(np.concatenate(starts), np.arange(34249))


def test_split_in_days() -> None:
    parts = split_rows(12672, 12, 12, (34, 5, 5), "inside")
    assert [end - begin for begin, end in parts.values()] == [34 * 288, 5 * 288, 5 * 288]


def test_no_window_crosses_a_jump() -> None:
    starts = window_starts((0, 20), 5, np.array([8, 15]))
    assert starts.tolist() == [0, 1, 2, 3, 8, 9, 10, 15]


@pytest.mark.parametrize(
    ("split", "windows"), [((0.7, 0.3), "inside"), ((1, 0, 1), "inside"), ((0.7, 0.1, 0.2), "between")]
)
def test_bad_splits_are_refused(split: tuple[float, ...], windows: str) -> None:
    with pytest.raises(ConfigError):
        split_rows(100, 12, 12, split, windows)


# ---- scaling -----------------------------------------------------------------------------------------------


def test_mean_and_std_are_those_of_the_materialised_training_windows(tmp_path: Path) -> None:
    """GMAN: over all readings X of the overlapping windows, population std, zeros included."""
    data = make_data(tmp_path, make_series(300, missing=0.1), split_windows="inside")
    values = data.series.values[:210, :, 0].astype(np.float64)
    x = np.stack([values[s : s + 12] for s in range(210 - 24 + 1)])
    assert data.mean == pytest.approx(x.mean(), rel=1e-9)
    assert data.std == pytest.approx(x.std(), rel=1e-9)


def test_history_counts_add_up() -> None:
    starts = np.array([0, 1, 2, 7])
    expected = np.bincount((starts[:, None] + np.arange(3)).ravel(), minlength=12)
    np.testing.assert_array_equal(history_counts(starts, 3, 12), expected)


def fitted(values: np.ndarray, **options) -> Preprocessing:
    preprocessing = Preprocessing(["speed"], **options)
    preprocessing.fit(values, np.ones(len(values)), "test")
    return preprocessing


READINGS = np.array([[0, 10], [20, 30], [0, np.nan], [40, 50]], dtype=np.float32)[:, :, None]


def test_missing_zero_enters_as_zero_and_counts_in_the_mean() -> None:
    preprocessing = fitted(READINGS)
    values = np.nan_to_num(READINGS[:, :, 0])
    np.testing.assert_allclose(
        preprocessing.inputs(READINGS), (values - values.mean()) / values.std(), rtol=1e-5
    )


def test_missing_nan_enters_as_the_mean_of_real_readings() -> None:
    preprocessing = fitted(READINGS, missing="nan")
    real = np.array([10, 20, 30, 40, 50])
    assert preprocessing.mean == [30.0]
    inputs = preprocessing.inputs(READINGS).numpy()
    np.testing.assert_allclose(
        inputs,
        [[0, (10 - 30) / real.std()], [-10 / real.std(), 0], [0, 0], [10 / real.std(), 20 / real.std()]],
        rtol=1e-5,
    )


def test_missing_mask_adds_a_channel_of_what_is_real() -> None:
    preprocessing = fitted(READINGS, missing="mask")
    inputs = preprocessing.inputs(READINGS)
    assert inputs.shape == (4, 2, 2)
    assert inputs[:, :, 1].tolist() == [[0, 1], [1, 1], [0, 0], [1, 1]]


def test_forward_fill_carries_the_last_reading_of_the_sensor() -> None:
    preprocessing = fitted(READINGS, missing="mask", fill="forward")
    filled = preprocessing.inputs(READINGS)[:, :, 0].numpy() * preprocessing.std[0] + preprocessing.mean[0]
    np.testing.assert_allclose(filled[1:], [[20, 30], [20, 30], [40, 50]], rtol=1e-5)
    assert filled[0, 0] == pytest.approx(preprocessing.mean[0])  # nothing to carry yet
    assert preprocessing.inputs(READINGS)[2, 0, 1] == 0  # filled, but not observed


def test_zeros_are_real_when_null_value_is_none() -> None:
    assert fitted(READINGS, missing="nan", null_value=None).observed(READINGS)[:, 0, 0].all()


def test_preprocessing_survives_a_checkpoint(tmp_path: Path) -> None:
    data = make_data(tmp_path, make_series(channels=2), channels=["flow"], missing="mask")
    again = Preprocessing(**data.extra()["preprocessing"])
    assert torch.equal(again.inputs(data.series.values), data.train_set.inputs)


# ---- windows and batches -----------------------------------------------------------------------------------


def test_windows_are_views_and_batches_stack_them(tmp_path: Path) -> None:
    windows = make_data(tmp_path, make_series(missing=0.2)).train_set
    assert isinstance(windows, Windows)
    batch = windows.__getitems__([5, 0, 17])
    for row, index in enumerate([5, 0, 17]):
        for name, view in windows[index].items():
            assert torch.equal(batch[name][row], view), name
    assert windows[5]["x"].untyped_storage().data_ptr() == windows.inputs.untyped_storage().data_ptr()


def test_batch_has_the_shapes_types_and_meaning_of_the_contract(tmp_path: Path) -> None:
    data = make_data(tmp_path, make_series(missing=0.2), batch_size=4, history=6, horizon=3)
    batch = next(iter(data.val_dataloader()))
    size = len(batch["x"])
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items()} == {
        "x": ((size, 6, SENSORS), torch.float32),
        "y": ((size, 3, SENSORS), torch.float32),
        "y_mask": ((size, 3, SENSORS), torch.bool),
        "time": ((size, 9, 2), torch.int64),
    }
    first = int(data.val_set.starts[0])
    raw = data.series.values[first : first + 9, :, 0]
    np.testing.assert_allclose(batch["x"][0] * data.std + data.mean, raw[:6], atol=1e-4)
    np.testing.assert_array_equal(batch["y"][0], raw[6:])
    assert torch.equal(batch["y_mask"], batch["y"] != 0)
    slots = data.series.time_features()[first : first + 9, 1]
    np.testing.assert_array_equal(batch["time"][0][:, 1], slots)


def test_a_day_of_the_week_that_training_never_saw_is_taken_for_one_of_its_kind() -> None:
    thursday_to_monday = {3, 4, 5, 6, 0}
    assert stand_ins(thursday_to_monday) == [0, 0, 0, 3, 4, 5, 6]
    assert stand_ins(range(5)) == [0, 1, 2, 3, 4, 4, 4]
    assert stand_ins([6]) == [6] * 7


def test_only_days_of_the_training_part_reach_the_model(tmp_path: Path) -> None:
    data = make_data(tmp_path, make_series(steps=288 * 5), batch_size=64)
    training = {int(day) for batch in data.train_dataloader() for day in batch["time"][..., 0].flatten()}
    tested = {int(day) for batch in data.test_dataloader() for day in batch["time"][..., 0].flatten()}
    raw = set(data.series.time_features()[:, 0].tolist())
    assert tested <= training < raw


def test_targets_are_finite_where_readings_are_nan(tmp_path: Path) -> None:
    series = make_series()
    series.values[150:170, 2] = np.nan
    data = make_data(tmp_path, series, missing="nan")
    batch = data.test_set.__getitems__(range(len(data.test_set)))
    assert batch["y"].isfinite().all()
    assert batch["x"].isfinite().all()
    assert not data.test_set.observed[150:170, 2].any()


def test_target_and_further_channels_are_chosen_by_name(tmp_path: Path) -> None:
    data = make_data(tmp_path, make_series(channels=3), target="flow", channels=["speed"])
    assert data.train_set[0]["x"].shape == (12, SENSORS, 2)
    np.testing.assert_array_equal(data.train_set[0]["y"], data.series.values[12:24, :, 1])
    assert data.extra()["channels"] == ["flow", "speed"]
    assert data.model_kwargs() == {
        "num_nodes": SENSORS,
        "history": 12,
        "horizon": 12,
        "steps_per_day": 288,
        "in_channels": 2,
    }


def test_split_of_the_file_is_used_unless_another_is_asked_for(tmp_path: Path) -> None:
    values = make_series().values
    for part, (begin, end) in {"train": (0, 100), "val": (100, 140), "test": (140, 200)}.items():
        np.save(tmp_path / f"{part}_data.npy", values[begin:end])
    (tmp_path / "meta.json").write_text('{"frequency (minutes)": 5}')
    data = TrafficData("parts", tmp_path, start="2024-01-03")
    data.setup()
    assert [len(s) for s in (data.train_set, data.val_set, data.test_set)] == [77, 17, 37]
    other = TrafficData("parts", tmp_path, start="2024-01-03", split=(0.7, 0.1, 0.2))
    other.setup()
    assert other.parts["train"] == (0, 124 + 23)


def test_gap_that_is_kept_is_crossed_by_no_window(tmp_path: Path) -> None:
    whole = make_series()
    kept = np.delete(np.arange(STEPS), range(60, 72))
    series = TrafficSeries(whole.values[kept], whole.timestamps[kept], whole.sensor_ids, 5, whole.channels)
    data = make_data(tmp_path, series, gaps="keep")
    starts = data.train_set.starts
    assert not ((starts > 60 - 24) & (starts < 60)).any()
    assert {59 - 23, 60} <= set(starts.tolist())


def test_dead_sensors_are_dropped_from_series_and_graph(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    series = make_series()
    series.values[:, 1] = 0
    adjacency = np.random.default_rng(0).random((SENSORS, SENSORS)).astype(np.float32)
    np.save(tmp_path / "adj.npy", adjacency)
    with caplog.at_level(logging.WARNING):
        data = make_data(tmp_path, series, dead_sensors="drop", adjacency=tmp_path / "adj.npy")
    assert data.series.sensor_ids == data.graph.sensor_ids == ["s0", "s2", "s3", "s4"]
    np.testing.assert_array_equal(data.graph.adjacency, np.delete(np.delete(adjacency, 1, 0), 1, 1))
    assert "left out 1 sensor ('s1')" in caplog.text


def test_spatial_embedding_says_where_it_comes_from(tmp_path: Path) -> None:
    np.save(tmp_path / "adj.npy", np.eye(SENSORS, k=1, dtype=np.float32))
    (tmp_path / "SE.txt").write_text(f"{SENSORS} 2\n" + "".join(f"{i} 1 2\n" for i in range(SENSORS)))
    assert make_data(tmp_path).extra()["spatial_embedding"] == "node2vec (correlations of the training part)"
    from_edges = make_data(tmp_path, adjacency=tmp_path / "adj.npy")
    assert from_edges.extra()["spatial_embedding"] == f"node2vec ({tmp_path / 'adj.npy'})"
    from_file = make_data(tmp_path, spatial_embedding=str(tmp_path / "SE.txt"))
    assert from_file.extra()["spatial_embedding"] == f"file ({tmp_path / 'SE.txt'})"
    assert from_file.graph.spatial_embedding(2).tolist() == [[1, 2]] * SENSORS


def test_longest_run() -> None:
    flags = np.array([[1, 0], [1, 1], [0, 1], [1, 1], [1, 0]], dtype=bool)
    assert longest_run(flags) == (1, 1, 3)


def test_loading_a_batch_costs_less_than_three_milliseconds(tmp_path: Path) -> None:
    """B = 16, N = 325, 12 + 12 steps; the fastest of the epochs, since other jobs may be running."""
    data = make_data(tmp_path, make_series(steps=600, sensors=325), batch_size=16)
    epochs = []
    for _ in range(5):
        begin = time.perf_counter()
        count = sum(1 for _ in data.train_dataloader())
        epochs.append((time.perf_counter() - begin) / count)
    assert min(epochs) < 3e-3


# ---- the real week -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def week(shared_data: Path) -> TrafficData:
    folder = shared_data / "traffic"
    data = TrafficData(
        "metr_la",
        folder / "los-loop/metr-la-week1.h5",
        adjacency=folder / "metr-la/adj_mx.pkl",
        locations=folder / "metr-la/graph_sensor_locations.csv",
        spatial_embedding=str(folder / "metr-la/SE(METR).txt"),
        split_windows="inside",
    )
    data.setup()
    return data


def test_real_week_is_split_as_the_specification_says(week: TrafficData) -> None:
    assert week.series.values.shape == (2016, 207, 1)
    assert [end - begin for begin, end in week.parts.values()] == [1411, 202, 403]
    assert [len(s) for s in (week.train_set, week.val_set, week.test_set)] == [1388, 179, 380]
    assert week.graph.spatial_embedding(64).shape == (207, 64)


def test_real_week_last_value_error(week: TrafficData) -> None:
    """Recorded in README: MAE 3.58 / 4.38 / 5.80, RMSE 6.47 / 8.24 / 10.90 at 15 / 30 / 60 minutes."""
    batch = week.test_set.__getitems__(range(380))
    error = (batch["x"][:, -1:] * week.std + week.mean - batch["y"])[:, [2, 5, 11]]
    assert error.abs().mean(dim=(0, 2)).tolist() == pytest.approx([3.58, 4.38, 5.80], abs=0.006)
    assert error.square().mean(dim=(0, 2)).sqrt().tolist() == pytest.approx([6.47, 8.24, 10.90], abs=0.006)
