"""Spatial embeddings computed from the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from domains.traffic.embedding import cooccurrence, laplacian_embedding, node2vec, random_walks, skip_gram
from domains.traffic.graph import read_adjacency, read_se, read_sensor_ids


def ring(nodes: int) -> np.ndarray:
    return (np.roll(np.eye(nodes), 1, axis=1) + np.roll(np.eye(nodes), -1, axis=1)).astype(np.float32)


def cosine(table: np.ndarray) -> np.ndarray:
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(unit), 1)]


def test_laplacian_vectors_are_eigenvectors_of_unit_variance_and_fixed_sign() -> None:
    rng = np.random.default_rng(0)
    adjacency = (rng.random((12, 12)) < 0.4).astype(np.float32)
    table = laplacian_embedding(adjacency, 5).astype(np.float64)
    weights = (adjacency + adjacency.T) / 2
    np.fill_diagonal(weights, 0)
    scale = weights.sum(1) ** -0.5
    laplacian = np.eye(12) - scale[:, None] * weights * scale
    values = np.linalg.eigvalsh(laplacian)[1:6]
    np.testing.assert_allclose(laplacian @ table, table * values, atol=1e-5)
    np.testing.assert_allclose(table.std(axis=0), 1, rtol=1e-5)
    assert (table[np.abs(table).argmax(axis=0), range(5)] > 0).all()


def test_laplacian_has_zeros_beyond_the_number_of_sensors() -> None:
    table = laplacian_embedding(ring(5), 8)
    assert (np.abs(table[:, :4]).max(axis=0) > 0.1).all()
    assert (table[:, 4:] == 0).all()


def test_walks_follow_edges_and_stop_at_dead_ends() -> None:
    line = np.diag(np.ones(3), 1).astype(np.float32)  # 0 -> 1 -> 2 -> 3
    walks = random_walks(line, p=2, q=1, walks_per_node=2, walk_length=6, rng=np.random.default_rng(0))
    assert walks[:4].tolist() == [
        [0, 1, 2, 3, -1, -1],
        [1, 2, 3, -1, -1, -1],
        [2, 3, -1, -1, -1, -1],
        [3, -1, -1, -1, -1, -1],
    ]


def test_walks_weigh_the_second_step_by_p_and_q() -> None:
    """From t = 0 to v = 1, then to 0 with 3/p, to 2 (joined to 0) with 1, to 3 (not joined) with 2/q."""
    adjacency = np.zeros((4, 4), dtype=np.float32)
    adjacency[0, 1], adjacency[0, 2] = 1, 1e-9
    adjacency[1, [0, 2, 3]] = 3, 1, 2
    walks = random_walks(
        adjacency, p=2, q=4, walks_per_node=20_000, walk_length=3, rng=np.random.default_rng(0)
    )
    third = walks[(walks[:, 0] == 0) & (walks[:, 1] == 1), 2]
    share = np.bincount(third, minlength=4) / len(third)
    np.testing.assert_allclose(share, np.array([1.5, 0, 1, 0.5]) / 3, atol=0.015)


def test_cooccurrence_counts_pairs_by_distance() -> None:
    counts = cooccurrence(np.array([[0, 1, 2, -1]]), 3, window=2)
    np.testing.assert_array_equal(counts, [[0, 1, 0.5], [1, 0, 1], [0.5, 1, 0]])


def test_skip_gram_raises_its_objective() -> None:
    walks = random_walks(ring(12), p=2, q=1, walks_per_node=10, walk_length=20, rng=np.random.default_rng(0))
    counts = cooccurrence(walks, 12, 3)
    table = skip_gram(counts, 8, epochs=100)
    near = np.array([table[i] @ table[(i + 1) % 12] for i in range(12)])
    far = np.array([table[i] @ table[(i + 6) % 12] for i in range(12)])
    assert near.min() > far.max()


def test_node2vec_repeats_itself_and_depends_on_the_seed() -> None:
    first, again, other = (node2vec(ring(10), 4, seed=seed, epochs=20) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


def test_node2vec_takes_sensors_without_edges() -> None:
    adjacency = ring(6)
    adjacency[0] = adjacency[:, 0] = 0
    assert np.isfinite(node2vec(adjacency, 4, epochs=5)).all()


def test_node2vec_resembles_the_published_embedding_of_metr_la(shared_data: Path) -> None:
    """Recorded: the cosines of all pairs of sensors correlate with the official ones at 0.91."""
    folder = shared_data / "traffic" / "metr-la"
    adjacency = read_adjacency(folder / "adj_mx.pkl", read_sensor_ids(folder / "graph_sensor_ids.txt"))
    ours, official = node2vec(adjacency, 64), read_se(folder / "SE(METR).txt", 207)
    assert np.corrcoef(cosine(ours), cosine(official))[0, 1] > 0.85
    assert ours.std() == pytest.approx(official.std(), rel=0.2)
