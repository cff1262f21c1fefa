"""Adjacency, locations and spatial embeddings from the files of the field."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from domains.traffic.graph import (
    SensorGraph,
    correlation_adjacency,
    gaussian_kernel,
    read_adjacency,
    read_locations,
    read_se,
    read_sensor_ids,
    stgcn_kernel,
)
from zoo.errors import ConfigError, DataError

IDS = ["400001", "400017", "400030"]
WEIGHTS = np.array([[1, 0.5, 0], [0, 1, 0.25], [0.75, 0, 1]], dtype=np.float32)
DISTANCES = np.array([[0, 100, np.inf], [120, 0, 300], [np.inf, 250, 0]])


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def write_edges(path: Path, matrix: np.ndarray, names: list[str], header: str = "") -> Path:
    rows = [
        f"{a},{b},{matrix[i, j]}"
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if np.isfinite(matrix[i, j])
    ]
    return write(path, header + "\n".join(rows))


def test_gaussian_kernel_uses_the_spread_of_finite_distances() -> None:
    sigma = np.std([0, 100, 120, 0, 300, 250, 0])
    expected = np.exp(-((DISTANCES / sigma) ** 2))
    expected[expected < 0.1] = 0
    np.testing.assert_allclose(gaussian_kernel(DISTANCES), expected, rtol=1e-6)
    assert gaussian_kernel(DISTANCES)[0, 2] == 0


def test_stgcn_kernel_cuts_at_one_half_and_has_no_diagonal() -> None:
    metres = np.array([[0.0, 1000.0], [3000.0, 0.0]])
    np.testing.assert_allclose(stgcn_kernel(metres), [[0, np.exp(-0.1)], [0, 0]], rtol=1e-6)


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickled_adjacency_is_put_in_the_order_of_the_series(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "adj_mx.pkl"
    path.write_bytes(pickle.dumps([IDS, {name: i for i, name in enumerate(IDS)}, WEIGHTS], protocol=protocol))
    np.testing.assert_array_equal(read_adjacency(path, IDS), WEIGHTS)
    np.testing.assert_array_equal(read_adjacency(path, IDS[::-1]), WEIGHTS[::-1, ::-1])


def test_matrix_reads_the_same_from_npy_csv_and_gman_text(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", WEIGHTS)
    np.savetxt(tmp_path / "a.csv", WEIGHTS, delimiter=",")
    write(tmp_path / "header.csv", "0,1,2\n" + "\n".join(",".join(map(str, row)) for row in WEIGHTS))
    write(tmp_path / "Adj.txt", "\n".join(f"{i} {j} {WEIGHTS[i, j]:.6f}" for i in range(3) for j in range(3)))
    for name in ("a.npy", "a.csv", "header.csv", "Adj.txt"):
        np.testing.assert_array_equal(read_adjacency(tmp_path / name, IDS), WEIGHTS, err_msg=name)


def test_edge_list_with_distances_to_itself_gets_the_gaussian_kernel(tmp_path: Path) -> None:
    path = write_edges(tmp_path / "distances.csv", DISTANCES, IDS)
    np.testing.assert_allclose(read_adjacency(path, IDS), gaussian_kernel(DISTANCES))


def test_edge_list_of_roads_is_binary_whether_it_names_ids_or_positions(tmp_path: Path) -> None:
    roads = np.where(np.eye(3, dtype=bool), np.inf, DISTANCES)
    for names in (IDS, ["0", "1", "2"]):
        path = write_edges(tmp_path / "roads.csv", roads, names, header="from,to,cost\n")
        np.testing.assert_array_equal(read_adjacency(path, IDS), np.isfinite(roads))


def test_edge_list_of_a_larger_network_is_cut_to_the_sensors(tmp_path: Path) -> None:
    path = write_edges(tmp_path / "distances.csv", DISTANCES, IDS)
    np.testing.assert_allclose(read_adjacency(path, IDS[:2]), gaussian_kernel(DISTANCES[:2, :2]))


def test_rule_can_be_chosen(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", WEIGHTS)
    np.testing.assert_array_equal(read_adjacency(tmp_path / "a.npy", IDS, rule="binary"), WEIGHTS > 0)


def test_real_pickles_equal_gman_files_and_the_kernel_of_the_distances(shared_data: Path) -> None:
    traffic = shared_data / "traffic"
    la = read_sensor_ids(traffic / "metr-la/graph_sensor_ids.txt")
    pickled = read_adjacency(traffic / "metr-la/adj_mx.pkl", la)
    assert np.count_nonzero(pickled) == 1722
    np.testing.assert_allclose(pickled, read_adjacency(traffic / "metr-la/Adj(METR).txt", la), atol=6e-7)
    bay = [
        line.split(",")[0]
        for line in (traffic / "pems-bay/graph_sensor_locations_bay.csv").read_text().split()
    ]
    pickled = read_adjacency(traffic / "pems-bay/adj_mx_bay.pkl", bay)
    assert np.count_nonzero(pickled) == 2694
    np.testing.assert_allclose(
        pickled, read_adjacency(traffic / "pems-bay/distances_bay_2017.csv", bay), atol=1e-6
    )


def test_real_road_lists_give_one_edge_per_row(shared_data: Path) -> None:
    folder = shared_data / "traffic" / "pems0x"
    for name, ids in (
        ("PEMS03", read_sensor_ids(folder / "PEMS03.txt")),
        ("PEMS04", [str(i) for i in range(307)]),
        ("PEMS07", [str(i) for i in range(883)]),
        ("PEMS08", [str(i) for i in range(170)]),
    ):
        pairs = {tuple(line.split(",")[:2]) for line in (folder / f"{name}.csv").read_text().split()[1:]}
        adjacency = read_adjacency(folder / f"{name}.csv", ids)
        assert adjacency.sum() == len(pairs), name
        assert set(np.unique(adjacency)) == {0, 1}


def test_real_distances_of_pemsd7_follow_stgcn(shared_data: Path) -> None:
    path = shared_data / "traffic" / "pemsd7m" / "W_228.csv"
    metres = np.loadtxt(path, delimiter=",", skiprows=1)
    np.testing.assert_array_equal(read_adjacency(path, [str(i) for i in range(228)]), stgcn_kernel(metres))


def test_locations_are_matched_by_id_or_by_row(tmp_path: Path) -> None:
    bare = write(tmp_path / "bare.csv", "400017,37.2,-121.9\n400030,37.3,-121.8\n400001,37.1,-121.7\n")
    np.testing.assert_array_equal(read_locations(bare, IDS), [[37.1, -121.7], [37.2, -121.9], [37.3, -121.8]])
    named = write(
        tmp_path / "named.csv", ",ID,Fwy,Dir,Latitude,Longitude\n0,9,5,S,1.0,2.0\n1,8,5,N,3.0,4.0\n"
    )
    np.testing.assert_array_equal(read_locations(named, ["0", "1"]), [[1, 2], [3, 4]])


def test_real_locations(shared_data: Path) -> None:
    folder = shared_data / "traffic" / "metr-la"
    places = read_locations(
        folder / "graph_sensor_locations.csv", read_sensor_ids(folder / "graph_sensor_ids.txt")
    )
    np.testing.assert_array_equal(places[0], [34.15497, -118.31829])
    assert places.shape == (207, 2)


def test_se_rows_come_in_any_order(tmp_path: Path) -> None:
    path = write(tmp_path / "SE.txt", "3 2\n2 0.5 0.6\n0 0.1 0.2\n1 0.3 0.4\n")
    np.testing.assert_allclose(read_se(path, 3), [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])


@pytest.mark.parametrize(
    ("name", "sensors", "std"), [("metr-la/SE(METR).txt", 207, 0.53), ("pems-bay/SE(PeMS).txt", 325, 0.86)]
)
def test_real_se_has_the_recorded_spread(shared_data: Path, name: str, sensors: int, std: float) -> None:
    table = read_se(shared_data / "traffic" / name, sensors)
    assert table.shape == (sensors, 64)
    assert table.std() == pytest.approx(std, abs=0.006)


def test_correlation_joins_like_to_like() -> None:
    rng = np.random.default_rng(0)
    waves = rng.normal(size=(200, 2))
    readings = np.repeat(waves, 3, axis=1) + 0.1 * rng.normal(size=(200, 6))
    readings[rng.random(readings.shape) < 0.05] = np.nan
    adjacency = correlation_adjacency(readings, neighbours=2)
    np.testing.assert_array_equal(adjacency > 0, np.kron(np.eye(2), np.ones((3, 3))) > 0)


def test_auto_embedding_is_the_file_when_there_is_one() -> None:
    table = np.ones((3, 4), dtype=np.float32)
    assert SensorGraph(IDS, WEIGHTS, embedding_table=table).embedding_method == "file"
    assert SensorGraph(IDS, WEIGHTS).embedding_method == "node2vec"


def test_select_cuts_every_array() -> None:
    graph = SensorGraph(IDS, WEIGHTS, np.arange(6.0).reshape(3, 2), np.eye(3, dtype=np.float32)).select(
        ["400030", "400001"]
    )
    for cut, expected in (
        (graph.adjacency, WEIGHTS[np.ix_([2, 0], [2, 0])]),
        (graph.coordinates, [[4, 5], [0, 1]]),
        (graph.embedding_table, np.eye(3)[[2, 0]]),
    ):
        assert cut is not None
        np.testing.assert_array_equal(cut, expected)


class Payload:
    """A pickle of this would create a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "adj.pkl"
    path.write_bytes(pickle.dumps([IDS, Payload(tmp_path / "ran"), WEIGHTS]))
    with pytest.raises(DataError, match=r"adj\.pkl was not unpickled: it asks to run"):
        read_adjacency(path, IDS)
    assert not (tmp_path / "ran").exists()


def test_sensors_that_do_not_match_are_named(tmp_path: Path) -> None:
    path = tmp_path / "adj.pkl"
    path.write_bytes(pickle.dumps([["400001", "400017", "999"], {}, WEIGHTS]))
    with pytest.raises(DataError, match=r"the series has no 1 sensor \('999'\), and 1 sensor \('400030'\)"):
        read_adjacency(path, IDS)
    edges = write(tmp_path / "edges.csv", "from,to,cost\n317842,318711,0.8\n")
    with pytest.raises(DataError, match=r"'317842', '318711'.*data\.sensor_ids=FILE"):
        read_adjacency(edges, IDS)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "1,0\n0,1\n", "adjacency of 2 x 2, but the series has 3 sensors"),
        ("a.csv", "1,0,0\n0,x,0\n0,0,1\n1,1,1\n", "row 2: 'x' is not a number"),
        ("a.csv", "1,0,0\n0,1\n", "row 2: 2 columns, but row 1 has 3"),
        ("a.csv", "1,0,0,0\n1,2,3,4\n", "neither a square matrix nor a list"),
        ("a.csv", "", "is empty"),
        ("a.csv", "1,0,0\n0,-1,0\n0,0,1\n", "finite and not negative"),
    ],
)
def test_bad_adjacency_text(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_adjacency(write(tmp_path / name, text), IDS)


def test_absent_file_and_unknown_rule(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No adjacency file .*nowhere\.pkl"):
        read_adjacency(tmp_path / "nowhere.pkl", IDS)
    with pytest.raises(ConfigError, match="Did you mean 'gaussian'"):
        read_adjacency(tmp_path / "nowhere.pkl", IDS, rule="gausian")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4 2\n0 1 1\n", "embeds 4 sensors, but the series has 3"),
        ("3 2\n0 1 1\n1 1 1\n1 2 2\n", r"line 4: index 1 with 2 numbers"),
        ("3 2\n0 1 1\n1 1\n2 1 1\n", "line 3: index 1 with 1 numbers"),
        ("3 2\n0 1 1\n1 1 1\n", r"no numbers for 1 index \('2'\)"),
        ("hello\n", "is not a spatial embedding"),
    ],
)
def test_bad_se(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_se(write(tmp_path / "SE.txt", text), 3)


def test_se_of_another_width_than_the_model_says_both(tmp_path: Path) -> None:
    graph = SensorGraph(IDS, embedding_table=np.ones((3, 4), dtype=np.float32))
    with pytest.raises(DataError, match="vectors of 4 numbers, but the model needs 64"):
        graph.spatial_embedding(64)


def test_embedding_without_edges_or_file_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.adjacency=FILE"):
        SensorGraph(IDS).spatial_embedding(4)
    with pytest.raises(DataError, match=r"data\.spatial_embedding=SE\.txt"):
        SensorGraph(IDS, WEIGHTS, embedding="file").spatial_embedding(4)
    with pytest.raises(ConfigError, match="Did you mean 'laplacian'"):
        SensorGraph(IDS, WEIGHTS, embedding="laplace").spatial_embedding(4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,lat,lon\n400001,1,2\n400017,1,2\n", r"no place for 1 sensor \('400030'\)"),
        ("id,north,east\n400001,1,2\n", "none is called latitude or lat"),
        ("400001,95,2\n400017,1,2\n400030,1,2\n", "sensor 400001 lies at"),
    ],
)
def test_bad_locations(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_locations(write(tmp_path / "places.csv", text), IDS)
