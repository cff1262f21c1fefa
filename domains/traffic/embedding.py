"""Spatial embeddings of a sensor graph: node2vec, and eigenvectors of the Laplacian."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import logsigmoid


def laplacian_embedding(adjacency: np.ndarray, dim: int) -> np.ndarray:
    """`[N, dim]` float32: the eigenvectors of the normalised Laplacian with the smallest eigenvalues but the
    first.

    `L = I - D^(-1/2) W D^(-1/2)` with `W` the mean of the adjacency and its transpose, without self loops
    (Belkin and Niyogi, "Laplacian eigenmaps", 2003). Every column has unit variance, and its entry of largest
    magnitude is positive. A graph of N sensors has N - 1 such vectors; further columns are zero.
    """
    weights = (adjacency + adjacency.T).astype(np.float64) / 2
    np.fill_diagonal(weights, 0)
    degree = weights.sum(axis=1)
    scale = np.divide(1, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
    laplacian = np.eye(len(weights)) - scale[:, None] * weights * scale
    vectors = np.linalg.eigh(laplacian)[1][:, 1 : dim + 1]
    largest = np.abs(vectors).round(6).argmax(axis=0)
    vectors = vectors * np.sign(vectors[largest, np.arange(vectors.shape[1])])
    spread = vectors.std(axis=0)
    table = np.zeros((len(weights), dim), dtype=np.float32)
    table[:, : vectors.shape[1]] = vectors / np.where(spread > 1e-9, spread, 1)
    return table


def node2vec(
    adjacency: np.ndarray,
    dim: int = 64,
    *,
    p: float = 2.0,
    q: float = 1.0,
    walks_per_node: int = 20,
    walk_length: int = 80,
    window: int = 10,
    epochs: int = 100,
    seed: int = 0,
) -> np.ndarray:
    """`[N, dim]` float32 embedding of a directed weighted graph (Grover and Leskovec, KDD 2016).

    GMAN's recipe (p = 2, q = 1, walks of 80 steps, window 10) with two changes that make it quick and exactly
    repeatable: the walks are drawn together, and the skip-gram objective is followed in expectation over
        pairs and
    negative samples instead of pair by pair.
    """
    rng = np.random.default_rng(seed)
    walks = random_walks(adjacency, p=p, q=q, walks_per_node=walks_per_node, walk_length=walk_length, rng=rng)
    return skip_gram(cooccurrence(walks, len(adjacency), window), dim, epochs=epochs, seed=seed)


def random_walks(
    adjacency: np.ndarray,
    *,
    p: float,
    q: float,
    walks_per_node: int,
    walk_length: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """`[N * walks_per_node, walk_length]` nodes visited, -1 after a dead end.

    A walk that came from t to v goes on to x with probability proportional to `w_vx` times 1/p if x = t, 1 if
    there is an edge t -> x, and 1/q otherwise.
    """
    neighbours, weights = _neighbour_lists(adjacency)
    edge = adjacency > 0
    walks = np.full((len(adjacency) * walks_per_node, walk_length), -1)
    walks[:, 0] = np.tile(np.arange(len(adjacency)), walks_per_node)
    for step in range(1, walk_length):
        walker = np.flatnonzero(walks[:, step - 1] >= 0)
        here = walks[walker, step - 1]
        options, weight = neighbours[here], weights[here]
        if step > 1:
            before = walks[walker, step - 2][:, None]
            weight = weight * np.where(options == before, 1 / p, np.where(edge[before, options], 1, 1 / q))
        cumulative = weight.cumsum(axis=1)
        goes_on = cumulative[:, -1] > 0
        drawn = rng.random((len(walker), 1)) * cumulative[:, -1:]
        choice = np.minimum((cumulative <= drawn).sum(axis=1), (weight > 0).sum(axis=1) - 1)
        walks[walker[goes_on], step] = options[goes_on, choice[goes_on]]
    return walks


def _neighbour_lists(adjacency: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`[N, K]` out-neighbours of every node and `[N, K]` their weights, padded with weight 0 at the end."""
    width = max(1, int((adjacency > 0).sum(axis=1).max()))
    order = np.argsort(-adjacency, axis=1, kind="stable")[:, :width]
    return order, np.take_along_axis(adjacency, order, axis=1).astype(np.float64)


def cooccurrence(walks: np.ndarray, num_nodes: int, window: int) -> np.ndarray:
    """`[N, N]` float64: how often skip-gram pairs node i (centre) with node j (context).

    word2vec draws the window of each centre uniformly from 1 .. window, so nodes at distance d form a pair
    with probability `(window - d + 1) / window`; these are the expected counts.
    """
    counts = np.zeros(num_nodes * num_nodes)
    for distance in range(1, min(window, walks.shape[1] - 1) + 1):
        centre, context = walks[:, :-distance].ravel(), walks[:, distance:].ravel()
        pairs = (centre * num_nodes + context)[context >= 0]
        counts += np.bincount(pairs, minlength=len(counts)) * ((window - distance + 1) / window)
    counts = counts.reshape(num_nodes, num_nodes)
    return counts + counts.T


def skip_gram(counts: np.ndarray, dim: int, *, epochs: int, negatives: int = 5, seed: int = 0) -> np.ndarray:
    """`[N, dim]` float32 vectors u that maximise the skip-gram objective with negative sampling.

    `sum_ij n_ij log s(u_i v_j) + negatives * n_i P_j log s(-u_i v_j)` with `s` the logistic function, `n_ij`
    the pair counts, and `P` the node frequencies to the power 3/4 (Mikolov et al., NeurIPS 2013; in this
    form: Levy and Goldberg, NeurIPS 2014), by Adam on all pairs at once.
    """
    generator = torch.Generator().manual_seed(seed)
    positive = torch.from_numpy(counts / counts.sum(axis=1, keepdims=True).clip(min=1)).float()
    frequency = torch.from_numpy(counts.sum(axis=0)).float() ** 0.75
    negative = negatives * frequency / frequency.sum().clamp(min=1e-12)
    centre = ((torch.rand(len(counts), dim, generator=generator) - 0.5) / dim).requires_grad_()
    context = torch.zeros(len(counts), dim, requires_grad=True)
    optimizer = torch.optim.Adam([centre, context], lr=0.05)
    for _ in range(epochs):
        scores = centre @ context.T
        loss = -(positive * logsigmoid(scores) + negative * logsigmoid(-scores)).sum() / len(counts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return centre.detach().numpy()
