"""The embedded traffic data: a freeway network simulated with the cell transmission model.

Daganzo, "The cell transmission model" (Transportation Research B 28, 1994): each freeway is a row of cells
whose density follows from the flows across their borders, a flow being the smaller of what the upstream cell
can send and what the downstream cell can receive. Commuter demand, bottlenecks, incidents and rain make
congestion that grows and travels as on a real road; ramps between crossing freeways carry it from one to
another. The speeds have the statistics of a METR-LA week (tests/domains/traffic/test_simulate.py), need no
network and no licence, and are written in the METR-LA file formats, so that the default data take the path of
every user's file.

Letters in shapes: D days simulated side by side, F freeways, C cells of a freeway, R on-ramps of a freeway,
L links between freeways, T time slots of five minutes, N sensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
from scipy.signal import lfilter

from domains.traffic.formats import write_h5
from domains.traffic.freeways import INTERVAL, Constants, Roads, build_roads, cell_capacity, sensor_graph
from domains.traffic.graph import SensorGraph
from domains.traffic.series import TrafficSeries
from zoo.errors import ConfigError, ZooError
from zoo.paths import cache_dir

VERSION = 1  # part of the cache key: raise it when a change of code changes the simulated values
SERIES_FILE, ADJACENCY_FILE, LOCATIONS_FILE = "speed.h5", "adjacency.npy", "locations.csv"
TRUTH_KEY = "_truth"  # float32 [T, N] in the h5 file, beside the frame `df`

SLOTS = 24 * 60 // INTERVAL  # readings per day
DAY_BREAK = 3 * 60 // INTERVAL  # simulated days run from 3:00 to 3:00, when the roads are all but empty
WARM_UP = 60 // INTERVAL  # slots simulated before each day and discarded


@dataclass(frozen=True)
class Simulation:
    """A simulated data set: `series` has 0 where a reading is missing, `truth` [T, N] has them all."""

    series: TrafficSeries
    truth: np.ndarray
    graph: SensorGraph


@dataclass(frozen=True)
class Clock:
    """Time of every slot of the simulation, from the warm-up before the first day on; arrays [T]."""

    hour: np.ndarray  # of the day
    day: np.ndarray  # 0, 1, ... counted from midnight before the first slot
    weekday: np.ndarray  # Monday = 0


def make(weeks: int = 4, seed: int = 0, constants: Constants | None = None) -> Path:
    """The METR-LA style h5 file (key `df`) of a simulation, from the cache or made now.

    The adjacency matrix and the sensor locations lie beside it, as `ADJACENCY_FILE` and `LOCATIONS_FILE`. The
    folder appears whole or not at all, whatever happens meanwhile in this process or another.

    Raises:
        ZooError: the cache cannot be written.
    """
    constants = constants or Constants()
    folder = cache_dir() / "traffic" / f"simulated-{weeks}w-seed{seed}-{_digest(weeks, seed, constants)}"
    if not folder.is_dir():
        simulation = simulate(weeks, seed, constants)
        try:
            _write_folder(simulation, folder)
        except OSError as error:
            raise ZooError(
                f"Cannot write the simulated traffic data to {folder}: {error.strerror or error}."
            ) from error
    return folder / SERIES_FILE


def simulate(weeks: int = 4, seed: int = 0, constants: Constants | None = None) -> Simulation:
    """Speeds in mph of every sensor, every five minutes; the same for the same arguments.

    Raises:
        ConfigError: fewer weeks than one.
    """
    if weeks < 1:
        raise ConfigError(f"weeks must be at least 1, not {weeks}.")
    c = constants or Constants()
    road_rng, demand_rng, event_rng, sensor_rng, missing_rng = np.random.default_rng(seed).spawn(5)
    roads = build_roads(c, road_rng)
    clock = _clock(c, 7 * weeks)
    main, ramps = draw_demand(c, roads, clock, demand_rng)
    capacity, speed = draw_disturbances(c, clock, event_rng)
    flow, density = run_days(c, roads, main, ramps, capacity, speed)
    truth = _measure(c, roads, flow, density, speed, sensor_rng)[: 7 * weeks * SLOTS]
    values = np.where(draw_missing(c, len(truth), truth.shape[1], missing_rng), np.float32(0), truth)
    graph = sensor_graph(c, roads)
    timestamps = np.datetime64(c.start, "s") + np.arange(len(truth)) * np.timedelta64(60 * INTERVAL, "s")
    source = f"simulation of {weeks} weeks with seed {seed}"
    series = TrafficSeries(
        values[:, :, None], timestamps, graph.sensor_ids, INTERVAL, ["speed"], source=source
    )
    return Simulation(series, truth, graph)


# ---- what happens on it ------------------------------------------------------------------------------------


def _clock(c: Constants, days: int) -> Clock:
    slots = np.arange((days + 1) * SLOTS + WARM_UP) + DAY_BREAK - WARM_UP
    day = slots // SLOTS
    eve = np.datetime64(c.start, "D").astype(int) - 1  # days since Thursday, 1 January 1970
    return Clock(hour=slots % SLOTS * INTERVAL / 60, day=day, weekday=(day + eve + 3) % 7)


def draw_demand(
    c: Constants, roads: Roads, clock: Clock, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Vehicles per hour that come to each freeway's first cell [T, F] and to its on-ramps [T, F, R].

    On-ramps that a link feeds get none: their traffic comes from the other freeway.
    """
    shape = (len(clock.hour), c.freeways)
    hour = clock.hour[:, None]
    morning, evening = (rng.uniform(*peak, c.freeways) for peak in (c.morning_peak, c.evening_peak))
    shift = rng.uniform(-1, 1, (2, c.freeways))
    weekday = 0.12 + 0.5 * _logistic((hour - 5.6) / 0.45) * _logistic((20.5 - hour) / 1.1)
    weekday = (
        weekday
        + morning * _bump(hour, 7.6 + 0.25 * shift[0], 1.0)
        + evening * _bump(hour, 17.1 + 0.3 * shift[1], 1.5)
    )
    weekend = 0.10 + 0.55 * _bump(hour, 14.5, 4.5) + 0.1 * _bump(hour, 19.0, 2.0)
    day_factor = rng.normal(1, c.day_noise, int(clock.day[-1]) + 1)[clock.day] * np.where(
        clock.weekday == 4, c.friday_factor, 1
    )
    level = np.where(clock.weekday[:, None] < 5, weekday, weekend) * day_factor[:, None]
    noise = rng.normal(0, c.demand_noise, (*shape, 1 + len(roads.on_ramps)))
    level = level[:, :, None] * (1 + np.asarray(lfilter([1], [1, -c.demand_memory], noise, axis=0)))
    ramp_peak = rng.uniform(*c.ramp_demand, (c.freeways, len(roads.on_ramps)))
    ramp_peak[roads.links.target, roads.links.ramp] = 0
    return c.main_demand * cell_capacity(c, roads)[:, 0] * level[:, :, 0], ramp_peak * level[:, :, 1:]


def draw_disturbances(c: Constants, clock: Clock, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Factors of capacity [T, F, C] (incidents, rain) and of free speed [T] (rain)."""
    wet = (rng.random(int(clock.day[-1]) + 1) < c.wet_days)[clock.day]
    capacity = np.ones((len(wet), c.freeways, c.cells)) * np.where(wet, c.wet_capacity, 1)[:, None, None]
    for _ in range(rng.poisson(c.incidents_per_day * c.freeways * len(wet) / SLOTS)):
        start, freeway, cell = (rng.integers(n) for n in capacity.shape)
        duration = int(np.clip(round(rng.lognormal(*c.incident_slots)), 3, 36))
        capacity[start : start + duration, freeway, cell] *= rng.uniform(*c.incident_capacity)
    return capacity, np.where(wet, c.wet_speed, 1)


class Traffic:
    """The vehicles on the roads on D days that run side by side.

    Attributes:
        density: [D, F, C] veh/mile.
        entry_queue, ramp_queue: [D, F], [D, F, R] vehicles that wait to enter.
        on_links: [D, L] vehicles under way from one freeway to another.
    """

    def __init__(self, c: Constants, roads: Roads, days: int) -> None:
        self.c, self.roads = c, roads
        self.jam = c.jam_density * roads.lanes
        self.merge_share = np.full((c.freeways, len(roads.on_ramps)), c.merge_share)
        self.merge_share[roads.links.target, roads.links.ramp] = c.link_merge_share
        self.density = np.zeros((days, c.freeways, c.cells))
        self.entry_queue = np.zeros((days, c.freeways))
        self.ramp_queue = np.zeros((days, c.freeways, len(roads.on_ramps)))
        self.delay = np.maximum(1, np.rint(roads.links.length / c.link_speed * 3600 / c.time_step)).astype(
            int
        )
        self.arrivals = np.zeros(
            (self.delay.max(initial=0) + 1, len(self.delay), days)
        )  # a ring of time steps
        self.on_links = np.zeros((days, len(self.delay)))
        self.clock = 0

    def vehicles(self) -> np.ndarray:
        """How many there are in all, queues included: [D]."""
        moving = self.c.cell_length * self.density.sum((1, 2)) + self.on_links.sum(1)
        return moving + self.entry_queue.sum(1) + self.ramp_queue.sum((1, 2))

    def step(
        self, main: np.ndarray, ramps: np.ndarray, capacity: np.ndarray, speed: np.ndarray
    ) -> np.ndarray:
        """Advance by one time step and return the outflow of every cell, veh/h [D, F, C].

        Args:
            main: [D, F] demand at the first cells, veh/h.
            ramps: [D, F, R] demand at the on-ramps, veh/h.
            capacity: [D, F, C] veh/h.
            speed: [D, F, 1] free speed, mph.
        """
        c, split = self.c, self.roads.split
        hours = c.time_step / 3600
        on = slice(c.ramp_spacing // 2, None, c.ramp_spacing)
        self.entry_queue += hours * main
        self.ramp_queue += hours * ramps
        self._arrive()

        congested = self.density * speed > 1.02 * capacity
        sending = np.minimum(speed * self.density, capacity * np.where(congested, 1 - c.capacity_drop, 1))
        receiving = np.minimum(capacity, c.wave_speed * (self.jam - self.density))
        from_ramps = np.minimum(self.ramp_queue / hours, c.ramp_capacity)
        from_ramps = np.minimum(from_ramps, self.merge_share * receiving[..., on])
        receiving[..., on] -= from_ramps
        from_entry = np.minimum(self.entry_queue / hours, receiving[..., 0])

        outflow = sending
        outflow[..., :-1] = np.minimum(sending[..., :-1], receiving[..., 1:] / (1 - split[:, :-1]))
        onto_links = self._leave_for_links(outflow, hours)

        self.density -= hours / c.cell_length * outflow
        self.density[..., 1:] += hours / c.cell_length * (outflow * (1 - split))[..., :-1]
        self.density[..., 0] += hours / c.cell_length * from_entry
        self.density[..., on] += hours / c.cell_length * from_ramps
        self.entry_queue -= hours * from_entry
        self.ramp_queue -= hours * from_ramps
        self.on_links += hours * onto_links
        self.arrivals[(self.clock + self.delay) % len(self.arrivals), np.arange(len(self.delay))] = (
            hours * onto_links.T
        )
        self.clock += 1
        return outflow

    def _arrive(self) -> None:
        """Move the vehicles at the end of their link to the queue of its on-ramp."""
        links = self.roads.links
        arrived = self.arrivals[self.clock % len(self.arrivals)].T
        self.ramp_queue[:, links.target, links.ramp] += arrived
        self.on_links -= arrived

    def _leave_for_links(self, outflow: np.ndarray, hours: float) -> np.ndarray:
        """The flow onto the links [D, L]; holds up, in place, the cells whose exit leads to a full link.

        Drivers keep their order (first in, first out): a blocked exit holds up the through traffic with it.
        """
        c, links = self.c, self.roads.links
        share = c.link_share * self.roads.split[links.source, links.exit]
        room = c.link_storage - self.on_links - self.ramp_queue[:, links.target, links.ramp]
        limit = np.divide(
            np.maximum(room, 0) / hours, share, out=np.full(room.shape, np.inf), where=share > 0
        )
        leaving = np.minimum(outflow[:, links.source, links.exit], limit)
        outflow[:, links.source, links.exit] = leaving
        return share * leaving


def run_days(
    c: Constants, roads: Roads, main: np.ndarray, ramps: np.ndarray, capacity: np.ndarray, speed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean outflow (veh/h) and density (veh/mile) of the cells with a sensor, [T - WARM_UP, F, C'].

    All days run at once, each after a warm-up in the hour before its 3:00: the roads are then so empty that
    the days fit together, and arrays of all days make NumPy fast.
    """
    days = (len(speed) - WARM_UP) // SLOTS
    slots = np.arange(days) * SLOTS + np.arange(SLOTS + WARM_UP)[:, None]
    traffic = Traffic(c, roads, days)
    flows, densities = [], []
    for now in slots:
        capacity_now = cell_capacity(c, roads) * capacity[now]
        speed_now = roads.free_speed[:, None] * speed[now, None, None]
        flow = density = np.zeros(())
        for _ in range(c.steps_per_slot):
            density = density + traffic.density[..., :: c.sensor_spacing]
            flow = (
                flow + traffic.step(main[now], ramps[now], capacity_now, speed_now)[..., :: c.sensor_spacing]
            )
        flows.append(flow / c.steps_per_slot)
        densities.append(density / c.steps_per_slot)
    return _join_days(flows), _join_days(densities)


def _join_days(slots: list[np.ndarray]) -> np.ndarray:
    """Slots of [D, F, C'] -> [D * SLOTS, F, C'], the warm-up left out."""
    by_day = np.stack(slots[WARM_UP:], axis=1)
    return by_day.reshape(-1, *by_day.shape[2:])


# ---- what the sensors see ----------------------------------------------------------------------------------


def _measure(
    c: Constants,
    roads: Roads,
    flow: np.ndarray,
    density: np.ndarray,
    speed: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Speeds [T, N] from the first midnight on, in mph with the noise of the sensors, between 1 and 70."""
    free = roads.free_speed[:, None] * speed[WARM_UP:, None, None]
    true = np.minimum(flow / np.maximum(density, 1e-3), free)
    noise = rng.normal(0, c.speed_noise, true.shape) * np.where(true < 45, c.slow_noise, 1)
    readings = np.clip(true + noise, 1, 70).astype(np.float32)
    return readings.reshape(len(readings), -1)[SLOTS - DAY_BREAK :]


def draw_missing(c: Constants, steps: int, sensors: int, rng: np.random.Generator) -> np.ndarray:
    """Which readings [T, N] are lost: outages of a sensor, of the whole network, and single slots."""
    lost = rng.random((steps, sensors)) < c.single_slots
    days = steps / SLOTS
    for _ in range(rng.poisson(c.outages_per_day * days * sensors)):
        start, sensor = rng.integers(steps), rng.integers(sensors)
        median = np.log(c.outage_hours * 60 / INTERVAL) - c.outage_spread**2 / 2
        lost[start : start + round(rng.lognormal(median, c.outage_spread)), sensor] = True
    for _ in range(rng.poisson(c.network_outages_per_day * days)):
        start = rng.integers(steps)
        lost[start : start + c.network_outage_slots] = True
    return lost


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _bump(x: np.ndarray, center: np.ndarray | float, width: float) -> np.ndarray:
    return np.exp(-(((x - center) / width) ** 2) / 2)


# ---- files -------------------------------------------------------------------------------------------------


def _write_folder(simulation: Simulation, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{uuid4().hex}.part")
    part.mkdir()
    try:
        graph = simulation.graph
        assert graph.adjacency is not None
        assert graph.coordinates is not None
        write_h5(simulation.series, part / SERIES_FILE, hidden={TRUTH_KEY: simulation.truth})
        np.save(part / ADJACENCY_FILE, graph.adjacency)
        places = zip(graph.sensor_ids, graph.coordinates, strict=True)
        rows = [f"{i},{sensor},{lat:.6f},{lon:.6f}\n" for i, (sensor, (lat, lon)) in enumerate(places)]
        (part / LOCATIONS_FILE).write_text(
            "index,sensor_id,latitude,longitude\n" + "".join(rows), encoding="utf-8"
        )
        os.rename(part, folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, with the same files
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _digest(weeks: int, seed: int, constants: Constants) -> str:
    key = json.dumps([VERSION, weeks, seed, asdict(constants)], sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:12]
