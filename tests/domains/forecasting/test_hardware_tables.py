"""Tables of computers: columns, encoding, splits, errors and baselines."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from domains.forecasting.hardware.baselines import BOOSTING, MEAN, RIDGE, WORKLOAD_MEAN, baselines
from domains.forecasting.hardware.data import HardwareData, split_rows
from domains.forecasting.hardware.encode import Encoder
from domains.forecasting.hardware.metrics import METRICS, errors
from domains.forecasting.hardware.simulate import (
    NOISE_OF_MACHINES,
    NOISE_OF_RUNS,
    TARGETS,
    simulate,
    simulate_runs,
)
from domains.forecasting.hardware.tables import Columns, as_written, read_table
from zoo.errors import ConfigError, DataError

ASKED: dict[str, Any] = {
    "numeric": {"memory": ["DIMM *"], "processor": ["cores", "clock"]},
    "text": {"system_text": ["OS"], "workload_text": ["test"]},
    "target": "score",
    "workload": None,
}


def table() -> pd.DataFrame:
    return as_written(
        pd.DataFrame(
            {
                "DIMM number": [8, 16, 8, 16],
                "DIMM speed": [3200.0, 4800.0, 4800.0, 5600.0],
                "cores": [10, 20, 30, 40],
                "clock": [2.0, 2.0, 2.0, 2.0],
                "OS": ["Linux 5", "Linux 6", "BSD", "Linux 5"],
                "test": ["copy", "copy", "add", "add"],
                "score": [100.0, 200.0, 150.0, 400.0],
            }
        )
    )


def columns(**changes: Any) -> Columns:
    return Columns.resolve(table(), **(ASKED | changes), source="runs.csv")


def encoder(**options: Any) -> Encoder:
    return Encoder.fit(table(), columns(), **options)


def test_patterns_take_the_columns_that_no_name_has_taken() -> None:
    found = columns(
        numeric={"speed": ["*"], "memory": ["DIMM number"], "empty": []}, text={"system_text": ["OS", "test"]}
    )
    assert found.numeric == {"speed": ["DIMM speed", "cores", "clock"], "memory": ["DIMM number"]}
    assert found.target == ["score"]
    assert found.workload == []


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": "scores"}, DataError, "runs.csv has no column 'scores'. Did you mean 'score'"),
        ({"numeric": {"memory": ["DIM speed"]}}, DataError, r"no column 'DIM speed' \(data.numeric.memory\)"),
        ({"numeric": {"memory": ["GPU*"]}}, DataError, r"no column 'GPU\*'"),
        (
            {"numeric": {"memory": ["cores"], "processor": ["cores"]}},
            ConfigError,
            "'cores' is in data.numeric.m",
        ),
        ({"numeric": {"memory": ["score"]}}, ConfigError, "'score' is the target"),
        ({"numeric": {}, "text": {}}, ConfigError, "No group has a column"),
        ({"target": []}, ConfigError, "Which column holds the score"),
        ({"workload": ["name"]}, DataError, "no column 'name'"),
    ],
)
def test_columns_that_cannot_be_are_named(changes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        columns(**changes)


def test_numbers_are_scaled_by_the_sample_deviation_and_constant_ones_are_0(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        fitted = encoder()
    assert "Constant in the training rows, so that they tell nothing: clock" in caplog.text
    numbers = fitted.inputs(table()).numbers
    np.testing.assert_allclose(
        numbers[:, 2], (np.array([10, 20, 30, 40]) - 25) / np.std([10, 20, 30, 40], ddof=1), 1e-6
    )
    other = table().assign(clock="3.5")
    assert not fitted.inputs(other).numbers[:, 3].any()


def test_min_max_scaling_ends_at_0_and_1() -> None:
    numbers = encoder(scaling="minmax").inputs(table()).numbers
    assert numbers[:, 1].tolist() == pytest.approx([0, 2 / 3, 2 / 3, 1])


def test_characters_are_numbered_by_frequency_in_lower_case_and_padded_at_the_end() -> None:
    fitted = encoder()
    assert fitted.lengths == {"system_text": [7], "workload_text": [4]}
    text = fitted.characters["system_text"]
    counts = ["linux 5linux 6bsdlinux 5".count(c) for c in text]
    assert counts == sorted(counts, reverse=True)
    codes = fitted.inputs(table()).codes
    decoded = ["".join(" " + text if c == 0 else text[c - 1] for c in row if c) for row in codes[:, :7]]
    assert decoded == ["linux 5", "linux 6", "bsd", "linux 5"]
    assert codes[2, 3:7].tolist() == [0, 0, 0, 0]


def test_longer_texts_are_cut_and_unseen_characters_left_out(caplog: pytest.LogCaptureFixture) -> None:
    fitted = encoder()
    with caplog.at_level(logging.WARNING):
        inputs = fitted.inputs(table().assign(OS="linux linux"))
    assert "4 texts of 'OS' are longer than the 7 characters of training: cut." in caplog.text
    assert inputs.codes.shape == (4, 11)
    known = fitted.inputs(table().assign(OS="linux")).codes
    np.testing.assert_array_equal(fitted.inputs(table().assign(OS="liznuqx")).codes, known)


def test_the_vocabulary_keeps_the_most_frequent_characters() -> None:
    fitted = encoder(vocabulary=4)
    assert len(fitted.characters["system_text"]) == 3
    assert fitted.inputs(table()).codes.max() == 3


@pytest.mark.parametrize("log_target", [False, True])
def test_scores_go_to_0_to_100_and_back(log_target: bool) -> None:
    fitted = encoder(log_target=log_target)
    scores = fitted.scores(table())
    scaled = fitted.scaled(scores)
    assert (scaled.min(), scaled.max()) == pytest.approx((0, 100))
    assert scaled[1, 0] == pytest.approx(50 if log_target else 100 / 3)
    np.testing.assert_allclose(fitted.unscaled(scaled), scores)


def test_an_encoder_is_stored_as_json() -> None:
    fitted = encoder(log_target=True)
    restored = Encoder.restored(json.loads(json.dumps(fitted.state())))
    np.testing.assert_array_equal(restored.inputs(table()).numbers, fitted.inputs(table()).numbers)
    np.testing.assert_array_equal(restored.inputs(table()).codes, fitted.inputs(table()).codes)
    assert restored.columns == fitted.columns


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cores": ["10", "x", "30", "40"]}, "column 'cores' holds 'x' in row 2, which is no finite number"),
        ({"cores": ["10", "inf", "30", "40"]}, "column 'cores' holds 'inf' in row 2"),
        ({"cores": ["10", "20", np.nan, "40"]}, "column 'cores' is empty in 1 rows, first in row 3"),
        ({"OS": [np.nan, "a", "b", "c"]}, "column 'OS' is empty in 1 rows, first in row 1"),
        ({"score": ["1", "2", "3", np.nan]}, "'score' is empty in 1 rows, first in row 4"),
        ({"score": ["7", "7", "7", "7"]}, "every training row has the same 'score'"),
    ],
)
def test_cells_that_cannot_be_used_are_named(changes: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Encoder.fit(table().assign(**changes), columns())


def test_a_score_of_0_has_no_logarithm() -> None:
    with pytest.raises(DataError, match="'score' is 0 in row 1, which has no logarithm"):
        Encoder.fit(table().assign(score=["0", "1", "2", "3"]), columns(), log_target=True)


def test_missing_cells_can_be_filled() -> None:
    fitted = Encoder.fit(table().assign(cores=["10", np.nan, "30", "40"]), columns(), missing="fill")
    inputs = fitted.inputs(table().assign(cores=["10", np.nan, "30", "40"], OS=[np.nan, "a", "b", "c"]))
    assert inputs.numbers[1, 2] == 0
    assert not inputs.codes[0, :7].any()


def test_a_table_lacks_a_column_of_the_weights() -> None:
    with pytest.raises(
        DataError, match=r"new.csv has no column 'cores', which the model reads. Did you mean 'core'"
    ):
        encoder().inputs(table().rename(columns={"cores": "core"}), "new.csv")


# ---- reading and splitting ---------------------------------------------------------------------------------


def test_csv_parquet_and_folders_read_alike(tmp_path: Path) -> None:
    whole = table()
    whole[:2].to_csv(tmp_path / "a.csv", index=False)
    whole[2:].to_csv(tmp_path / "b.csv", index=False)
    whole.to_parquet(tmp_path / "whole.parquet")
    from_folder = pd.concat(
        [read_table(tmp_path / "a.csv"), read_table(tmp_path / "b.csv")], ignore_index=True
    )
    pd.testing.assert_frame_equal(from_folder, read_table(tmp_path / "whole.parquet"), check_dtype=False)
    assert len(read_table(tmp_path)) == 8


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "There is no file"),
        ("t.xlsx", "a", "a table is a .csv or .parquet file"),
        ("t.csv", "", "cannot be read"),
        ("t.csv", "a,b\n", "has no rows"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / name)


def test_the_folds_part_all_rows_and_keep_keys_together() -> None:
    keys = np.repeat(np.arange(11).astype(str), 3)
    tested = []
    for fold in range(4):
        parts = split_rows(keys, folds=4, fold=fold, validation=0.2, seed=1)
        assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(33))
        held = [set(keys[rows]) for rows in parts.values()]
        assert sum(map(len, held)) == 11
        tested += parts["test"].tolist()
    assert sorted(tested) == list(range(33))
    one = split_rows(keys, folds=None, fold=10, validation=0.2, seed=1)["test"]
    assert len(set(keys[one])) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 4, "fold": 4}, "data.fold=4: there are the folds 0 to 3"),
        ({"folds": 9, "fold": 0}, "too few for 9 parts"),
        ({"folds": 1, "fold": 0}, "data.folds=1"),
    ],
)
def test_folds_that_do_not_exist(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_rows(np.arange(6), validation=0.2, seed=0, **options)


def test_all_that_is_fitted_is_fitted_on_the_training_rows() -> None:
    data = HardwareData(machines=30, folds=3, log_target=True)
    data.setup("fit")
    assert data.encoder.scaled(data.train_set.measured).max() == pytest.approx(100)
    numbers = data.train_set.numbers.numpy()
    np.testing.assert_allclose(numbers.mean(0), 0, atol=1e-5)
    assert np.abs(data.test_set.numbers.numpy().mean(0)).max() > 1e-3
    assert (data.batch_size, [len(data.parts[s]) for s in ("train", "val", "test")]) == (2, [18, 2, 10])


# ---- the simulation, errors, baselines ---------------------------------------------------------------------


def test_the_simulation_is_seeded_and_noise_has_the_stated_size() -> None:
    one, same, other = simulate(40, seed=1), simulate(40, seed=1), simulate(40, seed=2)
    pd.testing.assert_frame_equal(one, same)
    assert not one[TARGETS["dense"]].equals(other[TARGETS["dense"]])
    runs = simulate_runs(60, 13, seed=1)
    assert len(runs) == 60 * 13
    assert runs["score"].to_numpy().min() > 0
    noise = np.hypot(NOISE_OF_MACHINES, NOISE_OF_RUNS)
    assert noise == pytest.approx(0.025)


def test_stream_follows_the_memory_and_chess_the_cores() -> None:
    made = simulate(400)
    bandwidth = made["sockets"] * made["memory channels"] * made["memory speed"]
    cores = made["sockets"] * made["cores"] * made["all-core clock"]
    log = {name: np.log(made[TARGETS[name]]) for name in ("stream", "chess")}
    assert np.corrcoef(log["stream"], np.log(bandwidth))[0, 1] > 0.95
    assert np.corrcoef(log["chess"], np.log(cores))[0, 1] > 0.9
    assert np.corrcoef(log["stream"], np.log(cores))[0, 1] < 0.8


def test_errors_by_hand() -> None:
    measured, predicted = np.array([100.0, 200.0, -50.0, 0.0]), np.array([102.0, 192.0, -45.5, 1.0])
    found = errors(measured, predicted)
    assert set(found) == set(METRICS)
    assert found["MAE"] == pytest.approx((2 + 8 + 4.5 + 1) / 4)
    assert found["RMSE"] == pytest.approx(np.sqrt((4 + 64 + 4.5**2 + 1) / 4))
    assert found["MAPE"] == pytest.approx((2 + 4 + 9) / 3)
    assert [found[f"APE<{limit}"] for limit in (3, 5, 10)] == pytest.approx([100 / 3, 200 / 3, 100])
    assert found["P90 APE"] == pytest.approx(np.percentile([2, 4, 9], 90))


def test_percentages_of_nothing_but_zeros_are_undefined() -> None:
    found = errors(np.zeros(2), np.ones(2))
    assert (found["MAE"], found["MAPE"], found["APE<5"]) == (1, None, None)


def test_baselines_learn_what_they_can() -> None:
    """An additive law of a workload and a number: ridge finds it, the mean of the workload half of it."""
    draw = np.random.default_rng(0)
    cores, test = draw.integers(1, 50, 300), draw.choice(["copy", "add"], 300)
    made = pd.DataFrame(
        {"cores": cores, "test": test, "score": 5.0 * cores + np.where(test == "copy", 300, 0)}
    )
    rows: Any = as_written(made)
    asked: dict[str, Any] = ASKED | {"numeric": {"processor": ["cores"]}, "text": {"workload_text": ["test"]}}
    train, rest = rows[:200].reset_index(drop=True), rows[200:].reset_index(drop=True)
    fitted = Encoder.fit(train, Columns.resolve(rows, **asked, source="t"))
    found = baselines(train, rest, fitted)
    error = {name: np.abs(scores - fitted.scores(rest)).mean() for name, scores in found.items()}
    assert error[RIDGE] < 1 < error[BOOSTING] < 25 < error[WORKLOAD_MEAN] < error[MEAN]
    unseen = baselines(train, rest.assign(test="triad"), fitted)
    np.testing.assert_allclose(unseen[WORKLOAD_MEAN], unseen[MEAN])
