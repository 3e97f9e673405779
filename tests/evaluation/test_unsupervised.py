"""Clusters of voxels against labels, another view, and an image without content."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, jaccard_score

from medssl.core.errors import InputError, ShapeError
from medssl.evaluation.unsupervised import blank_check, cluster_counts, invariance, match_clusters, score_clusters


def test_unlabelled_voxels_are_left_out_and_numbers_beyond_are_refused():
    clusters, labels = np.array([[0, 1], [1, 2]]), np.array([[0, 0], [-1, 1]])
    assert cluster_counts(clusters, labels, 3, 2).tolist() == [[1, 0], [1, 0], [0, 1]]
    with pytest.raises(InputError, match="label outside 0 to 0"):
        cluster_counts(clusters, labels, 3, 1)
    with pytest.raises(InputError, match="cluster outside 0 to 1"):
        cluster_counts(clusters, labels, 2, 2)
    with pytest.raises(ShapeError):
        cluster_counts(clusters, labels[0], 3, 2)


@given(k=st.integers(2, 4), seed=st.integers(0, 10**6))
@settings(max_examples=30)
def test_scores_are_those_of_sklearn_after_the_best_of_all_permutations(k, seed):
    rng = np.random.default_rng(seed)
    clusters, labels = rng.integers(0, k, 60), rng.integers(0, k, 60)
    clusters[:k] = labels[:k] = np.arange(k)
    matching = match_clusters(cluster_counts(clusters, labels, k, k), "hungarian")
    assert sorted(matching) == list(range(k))
    best = max(np.mean(np.array(order)[clusters] == labels) for order in permutations(range(k)))
    scores = score_clusters(cluster_counts(clusters, labels, k, k), matching)
    predicted = matching[clusters]
    assert scores.accuracy == pytest.approx(best)
    assert scores.iou == pytest.approx(jaccard_score(labels, predicted, average=None))
    assert scores.miou == pytest.approx(jaccard_score(labels, predicted, average="macro"))
    assert scores.class_accuracy == pytest.approx(balanced_accuracy_score(labels, predicted))
    many = match_clusters(cluster_counts(clusters, labels, k, k), "many_to_one")
    assert score_clusters(cluster_counts(clusters, labels, k, k), many).accuracy >= scores.accuracy


def test_clusters_are_matched_on_one_set_and_scored_on_another():
    fit = np.array([[9, 0], [0, 9], [5, 6]])
    assert match_clusters(fit, "hungarian").tolist() == [0, 1, -1]
    assert match_clusters(fit, "many_to_one").tolist() == [0, 1, 1]
    other = np.array([[1, 0], [0, 1], [8, 0]])  # cluster 2 is another class here
    hungarian = score_clusters(other, match_clusters(fit, "hungarian"))
    assert hungarian.iou == pytest.approx((1 / 9, 1.0))
    assert hungarian.accuracy == pytest.approx(2 / 10)
    many = score_clusters(other, match_clusters(fit, "many_to_one"))
    assert many.iou == pytest.approx((1 / 9, 1 / 9))
    assert many.class_accuracy == pytest.approx((1 / 9 + 1) / 2)


def test_absent_classes_are_left_out_and_counted_and_empty_clusters_have_no_class():
    counts = np.array([[4, 0, 0], [0, 3, 0], [0, 0, 0]])
    matching = match_clusters(counts, "many_to_one")
    assert matching.tolist() == [0, 1, -1]
    scores = score_clusters(counts, matching)
    assert (scores.miou, scores.class_accuracy, scores.left_out) == (1.0, 1.0, 1)
    assert np.isnan(scores.iou[2])
    false_alarm = score_clusters(counts, np.array([0, 2, -1]))  # class 2 found where there is none: IoU 0, no recall
    assert (false_alarm.iou[2], false_alarm.left_out) == (0.0, 0)
    assert np.isnan(false_alarm.recall[2])
    with pytest.raises(InputError, match="no labelled voxel"):
        score_clusters(np.zeros((2, 2), dtype=np.int64), np.array([0, 1]))
    with pytest.raises(ShapeError):
        score_clusters(counts, np.array([0, 1]))


def test_fewer_clusters_than_classes_leave_a_class_unfound():
    counts = np.array([[8, 1, 0], [0, 2, 3]])
    scores = score_clusters(counts, match_clusters(counts, "hungarian"))
    assert scores.iou == pytest.approx((8 / 9, 0.0, 3 / 5))


def test_invariance_is_cohens_kappa_of_both_views():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 4, 500)
    second = np.where(rng.random(500) < 0.6, first, rng.integers(0, 4, 500))
    result = invariance(cluster_counts(first, second, 4, 4))
    assert result.agreement == pytest.approx(np.mean(first == second))
    assert result.kappa == pytest.approx(cohen_kappa_score(first, second))
    one = invariance(cluster_counts(np.zeros(9, int), np.zeros(9, int), 4, 4))
    assert (one.agreement, one.chance, one.kappa, one.n_places) == (1.0, 1.0, 0.0, 9)
    assert np.isnan(invariance(np.zeros((3, 3), dtype=np.int64)).kappa)


def test_a_blank_image_in_one_cluster_passes_and_a_rim_is_measured():
    clean = blank_check(np.full((8, 9, 7), 2))
    assert (clean.n_clusters, clean.minority_share, clean.reach, clean.depth) == (1, 0.0, 0, 4)
    rim = np.zeros((10, 8), dtype=np.int64)
    rim[2:-2, 2:-2] = 1
    found = blank_check(rim)
    assert (found.n_clusters, found.reach, found.depth) == (2, 2, 4)
    assert found.minority_share == pytest.approx(24 / 80)
    with pytest.raises(ShapeError):
        blank_check(np.zeros((0, 3)))
