"""Clusters are equally likely whatever their size, batches are functions of (seed, step, labels)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.core.errors import ConfigError, ShapeError
from medssl.core.types import ItemTable
from medssl.samplers import SAMPLERS, ClusterBalancedSampler, RandomSampler


def make_table(n: int) -> ItemTable:
    column = np.arange(n, dtype=np.int64)
    return ItemTable(column + 50, column // 2, column // 2, np.full(n, -1), column % 2)


def cluster_of(table: ItemTable, labels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return labels[np.searchsorted(table.row, rows)]


def test_every_cluster_and_every_item_inside_one_is_equally_likely():
    table = make_table(40)
    labels = np.array([5] * 30 + [0] * 6 + [9] * 3 + [-1])  # 1 to 4, 6 to 8 are empty
    sampler = ClusterBalancedSampler(table, seed=1, batch_size=30).with_clusters(labels[None])
    rows = np.concatenate([sampler.batch(step) for step in range(300)])
    drawn = cluster_of(table, labels, rows)
    assert set(drawn) == {0, 5, 9}
    # 9000 draws: 3000 of each cluster (sd 45); of the 30 items of cluster 5: 100 each (sd 10), of the 3 of 9: 1000
    for cluster, count in zip(*np.unique(drawn, return_counts=True), strict=True):
        assert abs(count - 3000) < 5 * 45, cluster
        each = np.unique(rows[drawn == cluster], return_counts=True)[1]
        assert len(each) == (labels == cluster).sum()
        assert np.abs(each - 3000 / len(each)).max() < 5 * np.sqrt(3000 / len(each))


@settings(max_examples=30)
@given(
    labels=st.lists(st.integers(-1, 4), min_size=12, max_size=12).filter(lambda found: max(found) >= 0),
    seed=st.integers(0, 2**31 - 1),
    step=st.integers(0, 10_000),
)
def test_batches_are_full_repeatable_tiled_by_ranks_and_of_the_chosen_head(labels, seed, step):
    table, own = make_table(12), np.array(labels)
    both = np.stack([np.zeros(12, dtype=np.int64), own])
    base = SAMPLERS["cluster_balanced"](table, seed=seed, batch_size=6, head=1)
    sampler = base.with_clusters(both)
    whole = sampler.batch(step)
    assert whole.dtype == np.int64
    assert whole.shape == (6,)
    assert (cluster_of(table, own, whole) >= 0).all()
    assert np.concatenate([sampler.batch(step, rank, 3) for rank in range(3)]).tolist() == whole.tolist()
    sampler.batch(step + 1)
    assert base.with_clusters(both).with_clusters(both).batch(step).tolist() == whole.tolist()


def test_without_labels_batches_are_random_ones_and_stay_so_for_the_unlabelled_table():
    table = make_table(12)
    plain = RandomSampler(table, seed=3, batch_size=5)
    sampler = ClusterBalancedSampler(table, seed=3, batch_size=5)
    for one in (sampler, sampler.with_clusters(np.full((1, 12), -1))):
        assert [one.batch(step).tolist() for step in range(9)] == [plain.batch(step).tolist() for step in range(9)]
    sampler.with_clusters(np.zeros((1, 12), dtype=np.int64))
    assert sampler.batch(4).tolist() == plain.batch(4).tolist()  # the first one is left as it was


def test_labels_of_another_table_and_a_head_that_is_not_there_are_refused():
    sampler = ClusterBalancedSampler(make_table(12), seed=3, batch_size=5, head=2)
    with pytest.raises(ShapeError, match=r"\(1, 11\), 12 items"):
        sampler.with_clusters(np.zeros((1, 11), dtype=np.int64))
    with pytest.raises(ConfigError, match="no such head") as caught:
        sampler.with_clusters(np.zeros((2, 12), dtype=np.int64))
    assert "2, heads 0 to 1" in str(caught.value)
