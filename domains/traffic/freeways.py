"""The freeways of the simulated data: lanes, ramps, links where they cross, and the sensors along them.

Letters in shapes: F freeways, C cells of a freeway, R on-ramps of a freeway, L links between freeways.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra

from domains.traffic.graph import SensorGraph, gaussian_kernel
from zoo.errors import ConfigError

INTERVAL = 5  # minutes per reading
MILES_PER_DEGREE = 69.0


@dataclass(frozen=True)
class Constants:
    """What the simulated network and its traffic are like. Miles, hours, vehicles (veh) and mph throughout.

    Raises:
        ConfigError: the time step is too long for the cells (Courant-Friedrichs-Lewy condition), or a size is
            too small.
    """

    start: str = "2024-01-04"  # first day; a Thursday, as in METR-LA
    # road
    freeways: int = 6  # one-way; the first half runs west-east, the other half south-north
    cells: int = 36
    cell_length: float = 0.3
    time_step: float = 15.0  # seconds
    lanes: int = 4
    bottlenecks: int = 2  # cells per freeway with one lane less
    free_speed: tuple[float, float] = (63.0, 69.0)
    wave_speed: float = 12.0  # of congestion, against the traffic
    jam_density: float = 190.0  # veh/mile and lane
    capacity_drop: float = 0.07  # discharge lost once a cell is congested
    # ramps
    ramp_spacing: int = 6  # cells; on-ramps at 3, 9, ..., off-ramps at 5, 11, ...
    exit_share: tuple[float, float] = (0.06, 0.16)
    ramp_capacity: float = 1800.0  # veh/h
    merge_share: float = 0.35  # of the free space that a ramp may take
    # links: an off-ramp that feeds an on-ramp of the freeway crossed
    freeway_spacing: float = 3.0  # between parallel freeways
    link_share: float = 0.75  # of the exit flow that stays on the freeways
    link_speed: float = 40.0
    link_storage: float = 120.0  # veh; a full link holds up its off-ramp
    link_merge_share: float = 0.125  # half a lane of four
    # demand
    main_demand: float = 0.95  # of the capacity of the first cell
    ramp_demand: tuple[float, float] = (400.0, 800.0)  # veh/h
    morning_peak: tuple[float, float] = (0.12, 0.42)
    evening_peak: tuple[float, float] = (0.15, 0.45)
    friday_factor: float = 1.04
    day_noise: float = 0.035
    demand_memory: float = 0.97  # AR(1) coefficient per slot
    demand_noise: float = 0.012  # its innovations
    # disturbances
    incidents_per_day: float = 1.3  # and freeway
    incident_slots: tuple[float, float] = (2.0, 0.6)  # log of the duration: mean, standard deviation
    incident_capacity: tuple[float, float] = (0.35, 0.7)
    wet_days: float = 0.12
    wet_capacity: float = 0.9
    wet_speed: float = 0.94
    # sensors
    sensor_spacing: int = 2  # cells
    speed_noise: float = 1.3
    slow_noise: float = 1.6  # times more below 45 mph
    # missing readings
    outages_per_day: float = 1 / 3  # and sensor
    outage_hours: float = 5.0  # mean of a lognormal duration
    outage_spread: float = 1.0  # standard deviation of its logarithm
    network_outages_per_day: float = 0.1
    network_outage_slots: int = 6
    single_slots: float = 0.01

    def __post_init__(self) -> None:
        courant = self.time_step / 3600 * self.free_speed[1] / self.cell_length
        if courant > 1:
            raise ConfigError(
                f"time_step {self.time_step:g} s is too long for cells of {self.cell_length:g} miles: "
                f"at {self.free_speed[1]:g} mph traffic crosses {courant:.2f} a step; at most 1 is stable."
            )
        if self.steps_per_slot * self.time_step != 60 * INTERVAL:
            raise ConfigError(
                f"time_step {self.time_step:g} s does not divide the reading interval of {60 * INTERVAL} s."
            )
        if self.freeways < 1 or self.cells <= self.ramp_spacing:
            raise ConfigError(
                f"freeways must be at least 1 and cells more than ramp_spacing {self.ramp_spacing}."
            )

    @property
    def steps_per_slot(self) -> int:
        return round(60 * INTERVAL / self.time_step)


@dataclass(frozen=True)
class Links:
    """Ramps from a freeway to one it crosses; arrays [L]."""

    source: np.ndarray  # freeway
    exit: np.ndarray  # its cell
    target: np.ndarray  # freeway
    ramp: np.ndarray  # its on-ramp
    length: np.ndarray  # miles


@dataclass(frozen=True)
class Roads:
    """The network: what does not change in time."""

    names: list[str]  # [F]
    free_speed: np.ndarray  # [F]
    lanes: np.ndarray  # [F, C]
    split: np.ndarray  # [F, C] share of the outflow that takes the off-ramp
    coordinates: np.ndarray  # [F, C, 2] latitude and longitude of the middle of each cell
    on_ramps: np.ndarray  # [R] cells
    links: Links


def build_roads(c: Constants, rng: np.random.Generator) -> Roads:
    """Lay the freeways on crossing lines, with bottlenecks, ramps and the links where they cross."""
    shape = (c.freeways, c.cells)
    lanes = np.full(shape, c.lanes)
    for row in lanes:
        row[rng.choice(np.arange(c.cells // 3, c.cells - 1), c.bottlenecks, replace=False)] -= 1
    split = np.zeros(shape)
    off_ramps = np.arange(c.ramp_spacing - 1, c.cells - 1, c.ramp_spacing)
    split[:, off_ramps] = rng.uniform(*c.exit_share, (c.freeways, len(off_ramps)))
    on_ramps = np.arange(c.ramp_spacing // 2, c.cells, c.ramp_spacing)
    names, origins, directions = _lay_lines(c, rng)
    return Roads(
        names=names,
        free_speed=rng.uniform(*c.free_speed, c.freeways),
        lanes=lanes,
        split=split,
        coordinates=_cell_coordinates(c, origins, directions),
        on_ramps=on_ramps,
        links=_link(c, origins, directions, off_ramps, on_ramps),
    )


def _lay_lines(c: Constants, rng: np.random.Generator) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of the freeways, first points [F, 2] (miles east and north of the centre), directions [F, 2]."""
    names, origins, directions = [], [], []
    eastward = (c.freeways + 1) // 2
    for i in range(c.freeways):
        along_x = i < eastward
        place, family = (i, eastward) if along_x else (i - eastward, c.freeways - eastward)
        offset = (place - (family - 1) / 2) * c.freeway_spacing + rng.uniform(-0.3, 0.3)
        angle = rng.uniform(-0.1, 0.1) + (0 if along_x else np.pi / 2)
        direction = np.array([np.cos(angle), np.sin(angle)]) * (-1) ** place
        middle = np.array([rng.uniform(-0.5, 0.5), offset] if along_x else [offset, rng.uniform(-0.5, 0.5)])
        names.append(("EW" if along_x else "NS")[place % 2] + str(i + 1))
        origins.append(middle - direction * c.cells * c.cell_length / 2)
        directions.append(direction)
    return names, np.array(origins), np.array(directions)


def _cell_coordinates(c: Constants, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Latitude and longitude [F, C, 2] of the middle of each cell, about 0, 0 where there is no real road."""
    miles = (np.arange(c.cells) + 0.5) * c.cell_length
    places = origins[:, None] + directions[:, None] * miles[:, None]
    return places[..., ::-1] / MILES_PER_DEGREE


def _link(
    c: Constants, origins: np.ndarray, directions: np.ndarray, off_ramps: np.ndarray, on_ramps: np.ndarray
) -> Links:
    """Join, wherever two freeways cross, the last exit before the crossing to the first on-ramp behind it."""
    rows = []
    exits, entries = (off_ramps + 1) * c.cell_length, on_ramps * c.cell_length
    for f in range(c.freeways):
        for g in range(c.freeways):
            across = np.stack([directions[f], -directions[g]], axis=1)
            if abs(np.linalg.det(across)) < 0.5:  # parallel
                continue
            here, there = np.linalg.solve(across, origins[g] - origins[f])
            leave = np.searchsorted(exits, here, side="right") - 1
            enter = np.searchsorted(entries, there)
            if leave >= 0 and here <= c.cells * c.cell_length and there >= 0 and enter < len(entries):
                rows.append((f, off_ramps[leave], g, enter, here - exits[leave] + entries[enter] - there))
    free = [
        row for i, row in enumerate(rows) if not any(row[:2] == r[:2] or row[2:4] == r[2:4] for r in rows[:i])
    ]
    columns = np.array(free, dtype=float).reshape(-1, 5).T
    return Links(*(column.astype(int) for column in columns[:4]), length=columns[4])


def cell_capacity(c: Constants, roads: Roads) -> np.ndarray:
    """veh/h [F, C], where the two branches of the triangular diagram meet."""
    u = roads.free_speed[:, None]
    return roads.lanes * u * c.wave_speed * c.jam_density / (u + c.wave_speed)


def sensor_graph(c: Constants, roads: Roads) -> SensorGraph:
    """A sensor on every second cell; kernel of the road distances downstream, across links too."""
    cells = np.arange(c.freeways * c.cells).reshape(c.freeways, c.cells)
    links = roads.links
    sources = np.concatenate([cells[:, :-1].ravel(), cells[links.source, links.exit]])
    targets = np.concatenate([cells[:, 1:].ravel(), cells[links.target, roads.on_ramps[links.ramp]]])
    steps = c.freeways * (c.cells - 1)
    miles = np.concatenate([np.full(steps, c.cell_length), links.length + c.cell_length])
    network = csr_array((miles, (sources, targets)), shape=(cells.size, cells.size))
    sensors = cells[:, :: c.sensor_spacing].ravel()
    distances = dijkstra(network, indices=sensors)[:, sensors]
    mile = (np.arange(0, c.cells, c.sensor_spacing) + 0.5) * c.cell_length
    ids = [f"{name}-{m:05.2f}" for name in roads.names for m in mile]
    return SensorGraph(
        sensor_ids=ids,
        adjacency=gaussian_kernel(distances),
        coordinates=roads.coordinates[:, :: c.sensor_spacing].reshape(-1, 2),
    )
