"""Dice and HD95 against brute force, and the rules for empty structures."""

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.core.errors import InputError, ShapeError
from medssl.evaluation import case_metrics, dice, hd95_mm, summarise


def brute_surface(mask: np.ndarray) -> list[tuple[int, ...]]:
    voxels = []
    for at in itertools.product(*map(range, mask.shape)):
        if not mask[at]:
            continue
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            other = list(at)
            other[axis] += step
            if not 0 <= other[axis] < mask.shape[axis] or not mask[tuple(other)]:
                voxels.append(at)
                break
    return voxels


def brute_hd95(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...]) -> float:
    def directed(source, target):
        nearest = sorted(
            min(math.dist(np.multiply(p, spacing), np.multiply(q, spacing)) for q in target) for p in source
        )
        place = 0.95 * (len(nearest) - 1)
        below = math.floor(place)
        above = min(below + 1, len(nearest) - 1)
        return nearest[below] + (place - below) * (nearest[above] - nearest[below])

    surfaces = brute_surface(a), brute_surface(b)
    return max(directed(*surfaces), directed(*surfaces[::-1]))


@settings(max_examples=300)
@given(
    shape=st.lists(st.integers(1, 7), min_size=2, max_size=3),
    spacing=st.lists(st.sampled_from([0.5, 1.0, 1.367, 3.0, 10.0]), min_size=3, max_size=3),
    density=st.tuples(st.floats(0.05, 0.95), st.floats(0.05, 0.95)),
    seed=st.integers(0, 2**31 - 1),
)
def test_hd95_and_dice_equal_brute_force(shape, spacing, density, seed):
    rng = np.random.default_rng(seed)
    a, b = (rng.random(shape) < p for p in density)
    a.flat[rng.integers(a.size)] = b.flat[rng.integers(b.size)] = True
    spacing = tuple(spacing[: len(shape)])
    assert hd95_mm(a, b, spacing) == pytest.approx(brute_hd95(a, b, spacing), abs=1e-9)
    assert hd95_mm(b, a, spacing) == pytest.approx(hd95_mm(a, b, spacing), abs=1e-12)
    both = sum(bool(x and y) for x, y in zip(a.flat, b.flat))
    assert dice(a, b) == pytest.approx(2 * both / (sum(a.flat) + sum(b.flat)), abs=1e-12)


def test_hd95_of_solid_shapes_equals_brute_force():
    grid = np.indices((14, 12, 8))
    ball = ((grid - np.array([6, 6, 4])[:, None, None, None]) ** 2).sum(0) <= 12
    box = np.zeros_like(ball)
    box[7:14, 2:9, 1:6] = True
    for spacing in ((1.0, 1.0, 1.0), (1.367, 1.367, 10.0), (0.5, 2.0, 3.0)):
        assert hd95_mm(ball, box, spacing) == pytest.approx(brute_hd95(ball, box, spacing), abs=1e-9)


def test_hd95_of_a_shifted_plane_is_the_shift_in_mm():
    a, b = np.zeros((10, 10, 10), bool), np.zeros((10, 10, 10), bool)
    a[:, :, 2] = b[:, :, 5] = True
    assert hd95_mm(a, b, (1.0, 1.0, 8.0)) == 24.0
    assert hd95_mm(a, a, (1.0, 1.0, 8.0)) == 0.0


def test_empty_sides_follow_the_stated_rules():
    empty, full = np.zeros((3, 4, 5), bool), np.ones((3, 4, 5), bool)
    diagonal = math.sqrt((3 * 1) ** 2 + (4 * 2) ** 2 + (5 * 10) ** 2)
    for a, b in ((empty, full), (full, empty)):
        assert dice(a, b) == 0
        assert hd95_mm(a, b, (1, 2, 10)) == pytest.approx(diagonal)
    assert math.isnan(dice(empty, empty))
    assert math.isnan(hd95_mm(empty, empty, (1, 2, 10)))


@given(seed=st.integers(0, 2**31 - 1))
def test_missing_a_structure_never_improves_a_score(seed):
    rng = np.random.default_rng(seed)
    label, prediction = rng.integers(0, 4, (2, 5, 6, 4))
    names = {0: "background", 1: "RV", 2: "MYO", 3: "LV"}
    before = summarise(pd.DataFrame(case_metrics(prediction, label, names, (1.0, 1.5, 8.0))))
    gone = np.where(prediction == 2, 0, prediction)
    after = summarise(pd.DataFrame(case_metrics(gone, label, names, (1.0, 1.5, 8.0))))
    assert after.dice <= before.dice
    assert after.hd95_mm >= before.hd95_mm
    assert after.missed == before.missed + 1


def test_case_metrics_hold_one_row_a_class_without_background():
    label = np.zeros((4, 4, 2), np.int16)
    label[0], label[1] = 1, 2
    prediction = np.where(label == 1, 1, 0)
    rows = case_metrics(prediction, label, {0: "background", 2: "LV", 1: "RV", 3: "MYO"}, (1.0, 1.0, 1.0))
    assert [row["class"] for row in rows] == ["RV", "LV", "MYO"]
    assert [row["missed"] for row in rows] == [False, True, False]
    assert [row["voxels"] for row in rows] == [8, 8, 0]
    assert rows[0]["dice"] == 1
    assert rows[1]["dice"] == 0
    assert math.isnan(rows[2]["dice"])
    assert [row["class"] for row in case_metrics(prediction, label, {}, (1.0, 1.0, 1.0))] == ["1", "2"]


def test_summary_counts_what_was_left_out_and_missed():
    table = pd.DataFrame(
        [
            {"class": "RV", "dice": 0.8, "hd95_mm": 4.0, "missed": False},
            {"class": "RV", "dice": 0.0, "hd95_mm": 100.0, "missed": True},
            {"class": "RV", "dice": np.nan, "hd95_mm": np.nan, "missed": False},
            {"class": "LV", "dice": 0.9, "hd95_mm": 2.0, "missed": False},
            {"class": "AA", "dice": np.nan, "hd95_mm": np.nan, "missed": False},
        ]
    )
    summary = summarise(table)
    rv = summary.classes["RV"]
    assert (rv.n, rv.left_out, rv.missed) == (2, 1, 1)
    assert (rv.dice, rv.hd95_mm, rv.hd95_mm_detected) == pytest.approx((0.4, 52.0, 4.0))
    assert rv.dice_sd == pytest.approx(0.8 / math.sqrt(2))
    assert (summary.n, summary.left_out, summary.missed) == (3, 2, 1)
    assert (summary.dice, summary.hd95_mm, summary.hd95_mm_detected) == pytest.approx((0.65, 27.0, 3.0))
    written = json.loads(json.dumps(summary.as_dict(), allow_nan=False))
    assert written["classes"]["AA"]["dice"] is None
    assert written["classes"]["LV"]["dice"] == 0.9


def test_wrong_inputs_are_refused():
    a = np.ones((2, 2), int)
    with pytest.raises(ShapeError, match="one shape"):
        dice(a, np.ones((2, 3)))
    with pytest.raises(ShapeError, match="one value per axis"):
        hd95_mm(a, a, (1.0,))
    for bad in ((1.0, 0.0), (1.0, -1.0), (1.0, math.nan)):
        with pytest.raises(InputError, match="positive"):
            hd95_mm(a, a, bad)
    with pytest.raises(InputError, match="integer label map"):
        case_metrics(a.astype(float), a, {1: "x"}, (1.0, 1.0))
    with pytest.raises(InputError, match="cannot be summarised"):
        summarise(pd.DataFrame({"class": ["a"], "dice": [1.0]}))
