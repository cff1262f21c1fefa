"""The simulated freeways: physics, statistics, files."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from domains.traffic.formats import read_series
from domains.traffic.freeways import Constants, Roads, build_roads
from domains.traffic.graph import read_adjacency, read_locations
from domains.traffic.simulate import (
    ADJACENCY_FILE,
    LOCATIONS_FILE,
    TRUTH_KEY,
    Simulation,
    Traffic,
    make,
    simulate,
)
from zoo.errors import ConfigError, ZooError

SMALL = Constants(freeways=2, cells=24)
COARSE = Constants(freeways=2, cells=8, cell_length=1.2, time_step=60.0)  # soon made


@pytest.fixture(scope="module")
def weeks() -> list[Simulation]:
    return [simulate(weeks=1, seed=seed) for seed in range(4)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    return tmp_path / "traffic"


# ---- statistics: the table of section 6 of the specification -----------------------------------------------

EXPECTED = {  # value, and by how much the mean of four weeks may differ
    "mean": (60.2, 1.5),
    "std": (14.1, 1.5),
    "share below 40 mph (%)": (10.9, 2.5),
    "autocorrelation 5 min": (0.84, 0.06),
    "autocorrelation 15 min": (0.78, 0.08),
    "autocorrelation 30 min": (0.69, 0.09),
    "autocorrelation 60 min": (0.54, 0.09),
    "last value MAE 15 min": (2.29, 0.3),
    "last value MAE 30 min": (3.06, 0.4),
    "last value MAE 60 min": (4.52, 0.6),
    "time-of-day mean MAE": (5.0, 0.8),
}


def statistics(speed: np.ndarray) -> dict[str, float]:
    """As the table has them: the last 30 % are the test part; this code gives the row of the real week."""
    found = {"mean": speed.mean(), "std": speed.std(), "share below 40 mph (%)": 100 * (speed < 40).mean()}
    centred = speed - speed.mean(axis=0)
    for lag in (1, 3, 6, 12):
        covariance = (centred[lag:] * centred[:-lag]).mean(axis=0)
        found[f"autocorrelation {5 * lag} min"] = (covariance / centred.var(axis=0)).mean()
    first = round(0.7 * len(speed))
    train, test = speed[:first], speed[first:]
    for lag in (3, 6, 12):
        found[f"last value MAE {5 * lag} min"] = np.abs(test[lag:] - test[:-lag]).mean()
    slot = np.arange(len(speed)) % 288
    profile = np.stack([train[slot[:first] == s].mean(axis=0) for s in range(288)])
    found["time-of-day mean MAE"] = np.abs(test - profile[slot[first:]]).mean()
    return found


@pytest.mark.parametrize("name", EXPECTED)
def test_a_simulated_week_has_the_statistics_of_the_table(weeks: list[Simulation], name: str) -> None:
    expected, tolerance = EXPECTED[name]
    measured = np.mean([statistics(week.truth)[name] for week in weeks])
    assert measured == pytest.approx(expected, abs=tolerance)


def test_the_statistics_of_the_real_week_are_those_of_the_table(shared_data: Path) -> None:
    real = statistics(read_series(shared_data / "traffic/los-loop/metr-la-week1.h5").values[:, :, 0])
    assert real["last value MAE 60 min"] == pytest.approx(5.41, abs=0.01)
    assert real["autocorrelation 5 min"] == pytest.approx(0.83, abs=0.01)


def test_eight_percent_of_the_readings_are_zero(weeks: list[Simulation]) -> None:
    missing = np.mean([(week.series.values == 0).mean() for week in weeks])
    assert missing == pytest.approx(0.08, abs=0.01)


def test_readings_that_are_not_missing_are_true(weeks: list[Simulation]) -> None:
    readings, truth = weeks[0].series.values[:, :, 0], weeks[0].truth
    assert np.array_equal(readings[readings != 0], truth[readings != 0])
    assert truth.min() >= 1
    assert truth.max() <= 70


def test_days_fit_together_at_three_in_the_morning(weeks: list[Simulation]) -> None:
    """A step across the seam of two simulated days is as small as those beside it."""
    change = np.concatenate([np.abs(np.diff(week.truth, axis=0)).mean(axis=1) for week in weeks])
    slot = np.tile(np.arange(1, 2016) % 288, len(weeks))
    assert change[slot == 36].mean() < 1.2 * change[(slot > 24) & (slot < 36)].mean()


# ---- physics -----------------------------------------------------------------------------------------------


def drive(
    roads: Roads, steps: int, demand: float = 6000.0, capacity: np.ndarray | None = None
) -> tuple[Traffic, float, np.ndarray]:
    """Two days of constant demand; the traffic, the vehicles that left, and the density in the end."""
    traffic = Traffic(SMALL, roads, days=2)
    main = np.full((2, SMALL.freeways), demand)
    ramps = np.full((2, SMALL.freeways, len(roads.on_ramps)), 400.0)
    ramps[:, roads.links.target, roads.links.ramp] = 0
    most = np.full((2, SMALL.freeways, SMALL.cells), 7500.0) if capacity is None else capacity
    hours = SMALL.time_step / 3600
    left = 0.0
    for _ in range(steps):
        outflow = traffic.step(main, ramps, most, roads.free_speed[None, :, None])
        exits = outflow * roads.split
        exits[:, roads.links.source, roads.links.exit] *= 1 - SMALL.link_share
        left += hours * (exits.sum() + outflow[..., -1].sum())
    return traffic, left, traffic.density


@pytest.fixture(scope="module")
def roads() -> Roads:
    return build_roads(SMALL, np.random.default_rng(1))


def test_vehicles_are_neither_made_nor_lost(roads: Roads) -> None:
    steps = 500
    traffic, left, _ = drive(roads, steps)
    free_ramps = SMALL.freeways * len(roads.on_ramps) - len(roads.links.source)
    came = 2 * steps * SMALL.time_step / 3600 * (SMALL.freeways * 6000.0 + free_ramps * 400.0)
    assert len(roads.links.source) == 2
    assert traffic.vehicles().sum() + left == pytest.approx(came, rel=1e-12)


def test_density_stays_between_empty_and_jam(roads: Roads) -> None:
    capacity = np.full((2, SMALL.freeways, SMALL.cells), 7500.0)
    capacity[:, :, 15] = 1500.0
    _, _, density = drive(roads, 800, capacity=capacity)
    assert density.min() >= 0
    assert (density <= SMALL.jam_density * roads.lanes * (1 + 1e-12)).all()


def test_congestion_travels_against_the_traffic(roads: Roads) -> None:
    capacity = np.full((2, SMALL.freeways, SMALL.cells), 7500.0)
    capacity[:, 0, 15] = 2500.0
    _, _, free = drive(roads, 240, demand=4000.0)
    _, _, blocked = drive(roads, 240, 4000.0, capacity)
    assert (blocked[0, 0, 10:15] > 2 * free[0, 0, 10:15]).all()
    assert (blocked[0, 0, 16:] < free[0, 0, 16:]).all()


def test_links_carry_congestion_to_the_freeway_that_feeds_them(roads: Roads) -> None:
    """A jam at the end of a link fills it, and then holds up the exit of the other freeway."""
    link = np.flatnonzero(roads.links.source == 0)[0]
    ramp = roads.on_ramps[roads.links.ramp[link]]
    capacity = np.full((2, SMALL.freeways, SMALL.cells), 7500.0)
    capacity[:, 1, ramp:] = 300.0
    _, _, free = drive(roads, 600)
    _, _, jammed = drive(roads, 600, capacity=capacity)
    cell = roads.links.exit[link]
    assert jammed[0, 0, cell] > 2 * free[0, 0, cell]


def test_a_time_step_in_which_traffic_skips_a_cell_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"time_step 20 s .* at most 1 is stable"):
        Constants(time_step=20.0)


def test_no_weeks_are_refused() -> None:
    with pytest.raises(ConfigError, match="weeks must be at least 1"):
        simulate(weeks=0)


# ---- files -------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_data_and_another_seed_other_data() -> None:
    first, again, other = (simulate(1, seed, COARSE).series.values for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_made_files_read_back_as_simulated(cache: Path) -> None:
    path = make(1, 3, COARSE)
    expected = simulate(1, 3, COARSE)
    series = read_series(path)
    ids = expected.graph.sensor_ids
    assert series.sensor_ids == ids
    assert np.array_equal(series.values, expected.series.values)
    assert np.array_equal(series.timestamps, expected.series.timestamps)
    assert expected.graph.adjacency is not None
    assert np.array_equal(read_adjacency(path.parent / ADJACENCY_FILE, ids), expected.graph.adjacency)
    assert expected.graph.coordinates is not None
    places = read_locations(path.parent / LOCATIONS_FILE, ids)
    assert places == pytest.approx(expected.graph.coordinates, abs=1e-6)
    with h5py.File(path) as file:
        assert np.array_equal(np.asarray(file[TRUTH_KEY]), expected.truth)


def test_making_twice_uses_the_cache_and_other_constants_do_not(cache: Path) -> None:
    path = make(1, 0, COARSE)
    written = path.stat().st_mtime_ns
    assert make(1, 0, COARSE) == path
    assert path.stat().st_mtime_ns == written
    assert make(1, 0, replace(COARSE, link_share=0.5)) != path


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "file"))
    with pytest.raises(ZooError, match=r"Cannot write .*file/traffic"):
        make(1, 0, COARSE)


def _make_coarse() -> None:
    make(1, 0, COARSE)


def test_two_processes_at_once_make_one_whole_folder(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_make_coarse) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    (folder,) = cache.iterdir()
    assert len(list(folder.iterdir())) == 3


def test_a_killed_write_leaves_no_folder_that_is_taken_for_whole(cache: Path) -> None:
    worker = multiprocessing.get_context("fork").Process(target=_make_coarse)
    worker.start()
    assert worker.pid is not None
    deadline = time.monotonic() + 30
    while not list(cache.glob(".*.part")) and time.monotonic() < deadline:
        time.sleep(0.0005)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    whole = [folder for folder in cache.iterdir() if not folder.name.startswith(".")]
    assert all(len(list(folder.iterdir())) == 3 for folder in whole)
    assert read_series(make(1, 0, COARSE)).values.shape == (2016, 8, 1)
