"""What is known of a sensor network besides its readings: edges, places, and spatial embeddings."""

from __future__ import annotations

import csv
import logging
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from domains.traffic.embedding import laplacian_embedding, node2vec
from domains.traffic.series import listed, sensor_name
from zoo.errors import ConfigError, DataError, did_you_mean

log = logging.getLogger(__name__)

EMBEDDINGS = ("auto", "file", "node2vec", "laplacian")
RULES = ("auto", "weights", "binary", "gaussian", "stgcn")


@dataclass
class SensorGraph:
    """The graph of N sensors.

    Attributes:
        sensor_ids: N names, in the order of every array below.
        adjacency: `[N, N]` float32 edge weights in [0, 1], row = from, column = to; None when unknown.
        coordinates: `[N, 2]` float64 latitude and longitude in degrees; None when unknown.
        embedding_table: `[N, D]` float32 spatial embedding read from a file; None when there is none.
        embedding: where `spatial_embedding` comes from: `file`, `node2vec` or `laplacian`; `auto` is the file
            if there is one, else node2vec.
        seed: of the random walks.
        source: where the edges come from, for messages and checkpoints.
    """

    sensor_ids: list[str]
    adjacency: np.ndarray | None = None
    coordinates: np.ndarray | None = None
    embedding_table: np.ndarray | None = None
    embedding: str = "auto"
    seed: int = 0
    source: str = "no file"

    @property
    def embedding_method(self) -> str:
        """`file`, `node2vec` or `laplacian`: the choice that `auto` stands for."""
        if self.embedding not in EMBEDDINGS:
            raise ConfigError(
                f"spatial embedding {self.embedding!r} is not one of {', '.join(EMBEDDINGS)} or a file."
                + did_you_mean(self.embedding, EMBEDDINGS)
            )
        if self.embedding != "auto":
            return self.embedding
        return "file" if self.embedding_table is not None else "node2vec"

    def spatial_embedding(self, dim: int) -> Tensor:
        """`[N, dim]` float32: one constant vector per sensor, near for sensors that lie near on the graph.

        Raises:
            DataError: the file's vectors have another width, or there is neither file nor adjacency.
        """
        method = self.embedding_method
        log.info("spatial embedding of %d sensors: %s (%s)", len(self.sensor_ids), method, self.source)
        if method == "file":
            return self._table(dim)
        adjacency = self._edges(f"a {method} embedding")
        embed = laplacian_embedding if method == "laplacian" else lambda a, d: node2vec(a, d, seed=self.seed)
        return torch.from_numpy(embed(adjacency, dim))

    def laplacian_eigenvectors(self, m: int) -> Tensor:
        """`[N, m]` float32: leading eigenvectors of the normalised Laplacian (see `laplacian_embedding`)."""
        return torch.from_numpy(laplacian_embedding(self._edges("Laplacian eigenvectors"), m))

    def select(self, sensor_ids: Sequence[str]) -> SensorGraph:
        """The graph of some of its sensors, in this order."""
        rows = [self.sensor_ids.index(sensor) for sensor in sensor_ids]
        return replace(
            self,
            sensor_ids=list(sensor_ids),
            adjacency=None if self.adjacency is None else self.adjacency[np.ix_(rows, rows)],
            coordinates=None if self.coordinates is None else self.coordinates[rows],
            embedding_table=None if self.embedding_table is None else self.embedding_table[rows],
        )

    def _table(self, dim: int) -> Tensor:
        if self.embedding_table is None:
            raise DataError("data.spatial_embedding=file needs a file: set data.spatial_embedding=SE.txt.")
        width = self.embedding_table.shape[1]
        if width != dim:
            raise DataError(
                f"The spatial embedding has vectors of {width} numbers, but the model needs {dim} (heads "
                f"times head width): choose heads that multiply to {width}, or "
                "data.spatial_embedding=node2vec."
            )
        return torch.from_numpy(self.embedding_table)

    def _edges(self, purpose: str) -> np.ndarray:
        if self.adjacency is None:
            raise DataError(f"{purpose} needs an adjacency: set data.adjacency=FILE.")
        return self.adjacency


# ---- from distances to weights -----------------------------------------------------------------------------


def gaussian_kernel(distances: np.ndarray, threshold: float = 0.1) -> np.ndarray:
    """`exp(-(d / sigma)^2)`, set to 0 below `threshold`; sigma is the standard deviation of all finite
    distances.

    The kernel of DCRNN (Li et al., ICLR 2018), which made the adjacency of METR-LA and PEMS-BAY.

    Args:
        distances: `[N, N]` road distances from row to column, in any unit; infinite where there is no road.

    Raises:
        DataError: the finite distances are all alike, so there is no scale.
    """
    sigma = distances[np.isfinite(distances)].std() if np.isfinite(distances).any() else 0.0
    if sigma == 0:
        raise DataError("Distances between sensors are all the same: the Gaussian kernel has no scale.")
    weights = np.exp(-np.square(distances / sigma))
    return np.where(weights < threshold, 0, weights).astype(np.float32)


def stgcn_kernel(metres: np.ndarray, sigma2: float = 0.1, epsilon: float = 0.5) -> np.ndarray:
    """`exp(-d^2 / sigma2)` of distances in units of 10 km, 0 below `epsilon` and on the diagonal.

    The kernel of STGCN (Yu et al., IJCAI 2018), which goes with PeMSD7's `W_228.csv`.
    """
    weights = np.exp(-np.square(metres / 10_000) / sigma2)
    weights[weights < epsilon] = 0
    np.fill_diagonal(weights, 0)
    return weights.astype(np.float32)


def correlation_adjacency(values: np.ndarray, neighbours: int = 10) -> np.ndarray:
    """Edges where no road map is known: every sensor to those it is most (positively) correlated with.

    Args:
        values: `[T, N]` readings, NaN where missing.
        neighbours: edges kept per sensor, itself not counted.
    """
    centred = values - np.nanmean(values, axis=0)
    centred = np.nan_to_num(centred)
    norm = np.linalg.norm(centred, axis=0)
    correlation = (centred.T @ centred) / np.maximum(np.outer(norm, norm), np.finfo(np.float32).tiny)
    np.fill_diagonal(correlation, -np.inf)
    kept = min(neighbours, len(correlation) - 1)
    cutoff = np.sort(correlation, axis=1)[:, len(correlation) - kept, None] if kept else np.inf
    weights = np.where(correlation >= cutoff, np.clip(correlation, 0, 1), 0)
    np.fill_diagonal(weights, 1)
    return np.maximum(weights, weights.T).astype(np.float32)


# ---- adjacency files ---------------------------------------------------------------------------------------


def read_adjacency(path: str | Path, sensor_ids: Sequence[str], *, rule: str = "auto") -> np.ndarray:
    """The `[N, N]` float32 adjacency of the sensors, in their order, from any file of the field.

    Files: DCRNN's `adj_mx.pkl` (only arrays are unpickled), GMAN's `Adj(*.txt)` (`i j weight` for all pairs),
        a
    matrix as `.npy` or `.csv` (with or without a header row), an edge list `from,to[,cost]` as `.csv`.

    Args:
        rule: how numbers become weights. `weights` takes them as they are, `binary` gives every listed edge
            1, `gaussian` and `stgcn` are the kernels above. `auto` takes numbers within [0, 1] as they are, a
            matrix with larger numbers as STGCN's distances, an edge list that has distances of sensors to
            themselves as DCRNN's (Gaussian), and other edge lists as PEMS0X's (binary).

    Raises:
        DataError: unreadable, not one row per sensor, or sensors that do not match, by name.
    """
    path = Path(path)
    if rule not in RULES:
        raise ConfigError(
            f"data.adjacency_rule={rule!r} is not one of {', '.join(RULES)}.{did_you_mean(rule, RULES)}"
        )
    if not path.is_file():
        raise DataError(f"No adjacency file {path}.")
    if path.suffix in (".pkl", ".pickle"):
        numbers, is_list = _from_pickle(path, sensor_ids), False
    elif path.suffix == ".npy":
        numbers, is_list = _square(_load_npy(path), path, sensor_ids), False
    else:
        numbers, is_list = _from_text(path, sensor_ids)
    if rule == "auto":
        rule = _rule_for(numbers, is_list)
    weights = _apply_rule(numbers, rule)
    if not np.isfinite(weights).all() or weights.min() < 0:
        raise DataError(f"{path}: adjacency weights must be finite and not negative.")
    log.info("adjacency %s: %d edges, rule %s", path, np.count_nonzero(weights), rule)
    return weights


def _rule_for(numbers: np.ndarray, is_list: bool) -> str:
    finite = numbers[np.isfinite(numbers)]
    if not is_list:
        return "weights" if finite.max(initial=0) <= 1 else "stgcn"
    if np.isfinite(np.diag(numbers)).all() and finite.max(initial=0) <= 1:
        return "weights"
    return "gaussian" if np.isfinite(np.diag(numbers)).all() else "binary"


def _apply_rule(numbers: np.ndarray, rule: str) -> np.ndarray:
    """Numbers `[N, N]`, infinite where a list has no edge, to weights."""
    if rule == "gaussian":
        return gaussian_kernel(numbers)
    if rule == "stgcn":
        return stgcn_kernel(numbers)
    if rule == "binary":
        some_left_out = np.isinf(numbers).any()
        return (np.isfinite(numbers) & ((numbers > 0) | some_left_out)).astype(np.float32)
    return np.where(np.isinf(numbers), 0, numbers).astype(np.float32)


class _ArraysOnly(pickle.Unpickler):
    """Rebuilds lists, dicts, strings, numbers and numpy arrays; runs nothing else that a pickle asks for."""

    ALLOWED: ClassVar = {
        ("multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("multiarray", "scalar"): np.float32(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            module = "multiarray"
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks to run {module}.{name}") from None


def _from_pickle(path: Path, sensor_ids: Sequence[str]) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            content = _ArraysOnly(file, encoding="latin1").load()
    except Exception as error:
        raise DataError(
            f"{path} was not unpickled: {error}. Save the matrix as .npy or .csv instead."
        ) from None
    if isinstance(content, np.ndarray):
        return _square(content, path, sensor_ids)
    if not (isinstance(content, (list, tuple)) and len(content) == 3):
        raise DataError(f"{path} holds a {type(content).__name__}, not [sensor ids, id to index, adjacency].")
    matrix = _square(content[2], path, sensor_ids)
    ids = [sensor_name(sensor) for sensor in content[0]]
    if sorted(ids) != sorted(sensor_ids):
        raise DataError(f"{path} does not match the series: {_differences(ids, sensor_ids)}.")
    order = [ids.index(sensor) for sensor in sensor_ids]
    return matrix[np.ix_(order, order)]


def _from_text(path: Path, sensor_ids: Sequence[str]) -> tuple[np.ndarray, bool]:
    """The numbers of a text file, and whether it is an edge list."""
    table = _read_table(path)
    rows, columns = table.shape
    if rows == columns + 1 or (rows == columns and not _is_header(table.iloc[0])):
        return _square(_numbers(table.iloc[rows - columns :], path), path, sensor_ids), False
    if columns in (2, 3):
        return _from_edges(table, path, sensor_ids), True
    raise DataError(
        f"{path} has {rows} rows of {columns} columns: neither a square matrix nor a list from,to,cost."
    )


def _from_edges(table: pd.DataFrame, path: Path, sensor_ids: Sequence[str]) -> np.ndarray:
    """Costs `[N, N]`, infinite where the list has no edge."""
    if _is_header(table.iloc[0]):
        table = table.iloc[1:]
    ends = table.iloc[:, :2].map(sensor_name)
    index = _index_of(ends, path, sensor_ids)
    start, stop = (ends[column].map(index) for column in ends)
    known = (start.notna() & stop.notna()).to_numpy()
    cost = _numbers(table.iloc[:, [2]], path)[:, 0] if table.shape[1] == 3 else np.ones(len(table))
    numbers = np.full((len(sensor_ids),) * 2, np.inf)
    numbers[start[known].astype(int), stop[known].astype(int)] = cost[known]
    return numbers


def _index_of(ends: pd.DataFrame, path: Path, sensor_ids: Sequence[str]) -> dict[str, int]:
    """Name -> index of the sensors that an edge list joins, which it may call by id or by position."""
    named = set(ends.to_numpy().ravel())
    by_id = {sensor: i for i, sensor in enumerate(sensor_ids)}
    by_position = {str(i): i for i in range(len(sensor_ids))}
    for index in (by_id, by_position):
        if named <= index.keys():
            return index
    if by_id.keys() <= named:
        return by_id
    raise DataError(
        f"{path} does not match the series: {_differences(sorted(named), sensor_ids)}. If the series has no "
        "ids of its own, name the file that lists them: data.sensor_ids=FILE."
    )


def _square(matrix: np.ndarray, path: Path, sensor_ids: Sequence[str]) -> np.ndarray:
    if (
        getattr(matrix, "ndim", 0) != 2
        or matrix.shape[0] != matrix.shape[1]
        or len(matrix) != len(sensor_ids)
    ):
        shape = " x ".join(map(str, getattr(matrix, "shape", ("?",))))
        raise DataError(f"{path} is an adjacency of {shape}, but the series has {len(sensor_ids)} sensors.")
    return np.asarray(matrix, dtype=np.float64)


def _load_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path} is no numpy array without pickled objects: {error}.") from None


# ---- places and embeddings ---------------------------------------------------------------------------------

LATITUDE = ("latitude", "lat")
LONGITUDE = ("longitude", "lng", "lon", "long")
STATION = ("sensor_id", "sensor", "station_id", "station", "detector_id", "detector", "id")


def read_sensor_ids(path: str | Path) -> list[str]:
    """Sensor ids separated by commas or line ends (`graph_sensor_ids.txt`, `PEMS03.txt`)."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"No file of sensor ids {path}.")
    return [
        name.strip() for line in path.read_text().splitlines() for name in line.split(",") if name.strip()
    ]


def read_locations(path: str | Path, sensor_ids: Sequence[str]) -> np.ndarray:
    """`[N, 2]` float64 latitude and longitude of the sensors, from a table of stations.

    The table has a header that names latitude and longitude, or is `id,latitude,longitude` without one.
    Stations are matched by id; when none of the ids agree and the counts do, row i is sensor i.

    Raises:
        DataError: no such columns, sensors without a place, or degrees out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"No file of locations {path}.")
    table = _read_table(path)
    ids, places = _stations(table, path)
    if len(ids) == len(sensor_ids) and not set(ids) & set(sensor_ids):
        ids = list(sensor_ids)
    row = {sensor: i for i, sensor in enumerate(ids)}
    if absent := [sensor for sensor in sensor_ids if sensor not in row]:
        raise DataError(f"{path} has no place for {listed(absent, 'sensor')}.")
    places = places[[row[sensor] for sensor in sensor_ids]]
    wrong = ~((np.abs(places[:, 0]) <= 90) & (np.abs(places[:, 1]) <= 180))
    if wrong.any():
        sensor = int(np.argmax(wrong))
        raise DataError(
            f"{path}: sensor {sensor_ids[sensor]} lies at {places[sensor].tolist()}, out of range."
        )
    return places


def _stations(table: pd.DataFrame, path: Path) -> tuple[list[str], np.ndarray]:
    if not _is_header(table.iloc[0]):
        if table.shape[1] != 3:
            raise DataError(
                f"{path} has no header and {table.shape[1]} columns; id,latitude,longitude are expected."
            )
        return table.iloc[:, 0].map(sensor_name).tolist(), _numbers(table.iloc[:, 1:], path)
    names = [str(name).strip().lower() for name in table.iloc[0]]
    body = table.iloc[1:]
    columns = []
    for aliases in (LATITUDE, LONGITUDE, STATION):
        found = [names.index(alias) for alias in aliases if alias in names]
        if not found:
            raise DataError(f"{path} has columns {', '.join(names)}: none is called {' or '.join(aliases)}.")
        columns.append(found[0])
    return body.iloc[:, columns[2]].map(sensor_name).tolist(), _numbers(body.iloc[:, columns[:2]], path)


def read_se(path: str | Path, num_sensors: int) -> np.ndarray:
    """`[N, D]` float32 spatial embedding in word2vec text format: `N D`, then `index v1 ... vD` in any order.

    Raises:
        DataError: not this format, another number of sensors, or rows missing, repeated or of another width.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"No spatial embedding file {path}.")
    lines = path.read_text(errors="replace").rstrip().split("\n")
    try:
        count, width = map(int, lines[0].split())
        rows = [(int(index), vector) for index, *vector in map(str.split, lines[1:])]
    except ValueError:
        raise DataError(
            f"{path} is not a spatial embedding: its first line must be 'sensors width'."
        ) from None
    if count != num_sensors:
        raise DataError(f"{path} embeds {count} sensors, but the series has {num_sensors}.")
    table = np.full((count, width), np.nan, dtype=np.float32)
    for line, (index, vector) in enumerate(rows, start=2):
        if not 0 <= index < count or len(vector) != width or not np.isnan(table[index]).all():
            raise DataError(
                f"{path}, line {line}: index {index} with {len(vector)} numbers; every index 0..{count - 1} "
                f"is expected once, with {width} numbers."
            )
        table[index] = vector
    if np.isnan(table).any():
        absent = np.flatnonzero(np.isnan(table).any(axis=1))
        raise DataError(f"{path} has no numbers for {listed([str(i) for i in absent], 'index')}.")
    return table


# ---- tables of text ----------------------------------------------------------------------------------------


def _read_table(path: Path) -> pd.DataFrame:
    """All cells as text, split at commas or, without any, at white space."""
    with open(path, newline="", errors="replace") as file:
        first = file.readline()
        file.seek(0)
        rows = list(csv.reader(file)) if "," in first else [line.split() for line in file]
    rows = [row for row in rows if row]
    if not rows:
        raise DataError(f"{path} is empty.")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(rows[0]):
            raise DataError(f"{path}, row {number}: {len(row)} columns, but row 1 has {len(rows[0])}.")
    return pd.DataFrame(rows)


def numeric(cells: Any) -> pd.Series:
    """The numbers of a column or row, NaN where there is other text."""
    return cast(pd.Series, pd.to_numeric(cells, errors="coerce"))


def _is_header(row: pd.Series) -> bool:
    return bool(numeric(row[row != ""]).isna().any())


def _numbers(table: pd.DataFrame, path: Path) -> np.ndarray:
    numbers = table.apply(numeric)
    wrong = np.argwhere(numbers.isna().to_numpy())
    if len(wrong):
        row, column = wrong[0]
        raise DataError(f"{path}, row {table.index[row] + 1}: {table.iat[row, column]!r} is not a number.")
    return numbers.to_numpy(dtype=np.float64)


def _differences(found: Sequence[str], expected: Sequence[str]) -> str:
    unknown = [sensor for sensor in found if sensor not in set(expected)]
    absent = [sensor for sensor in expected if sensor not in set(found)]
    parts = [f"the series has no {listed(unknown, 'sensor')}"] if unknown else []
    parts += [f"{listed(absent, 'sensor')} of the series are not in the file"] if absent else []
    return ", and ".join(parts) or "sensors are repeated"
