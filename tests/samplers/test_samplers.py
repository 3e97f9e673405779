"""Samplers are pure functions of (seed, step) whose batches are full, free of repeats and tiled by the ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from medssl.core.errors import ConfigError, InputError
from medssl.core.schema import tagged_union
from medssl.core.types import ItemTable
from medssl.samplers import SAMPLERS


def make_table(slices: list[int], subjects: list[int], n_partitions: int = 4, first_row: int = 100) -> ItemTable:
    """Volumes of ``slices`` slices; what is left over after equal partitions belongs to none."""
    volume = np.repeat(np.arange(len(slices)) * 3 + 1, slices)
    position = np.concatenate([np.arange(n) for n in slices])
    partition = np.concatenate([np.arange(n) // (n // n_partitions) for n in slices])
    return ItemTable(
        row=np.arange(first_row, first_row + len(volume)),
        subject=np.repeat(subjects, slices),
        volume=volume,
        partition=np.where(partition < n_partitions, partition, -1),
        position=position,
        n_partitions=n_partitions,
    )


def items(table: ItemTable, rows: np.ndarray) -> ItemTable:
    assert np.isin(rows, table.row).all()
    return table.select(np.searchsorted(table.row, rows))


cohorts = st.lists(st.tuples(st.integers(4, 14), st.integers(0, 5)), min_size=3, max_size=9)
seeds = st.integers(0, 2**31 - 1)


@given(cohort=cohorts, m=st.integers(1, 3), seed=seeds, step=st.integers(0, 10_000))
def test_partition_batches_hold_every_partition_of_m_volumes_once(cohort, m, seed, step):
    table = make_table([n for n, _ in cohort], [s for _, s in cohort])
    chosen = items(table, SAMPLERS["partition"](table, seed=seed, n_volumes=m).batch(step))
    volumes = np.unique(chosen.volume)
    assert len(volumes) == m
    for volume in volumes:
        assert sorted(chosen.partition[chosen.volume == volume]) == [0, 1, 2, 3]
    if len({s for _, s in cohort}) >= m:
        assert len(np.unique(chosen.subject)) == m


@given(cohort=cohorts, m=st.integers(2, 3), seed=seeds, step=st.integers(0, 10_000))
def test_partition_pairs_hold_each_partition_at_all_m_volumes_together(cohort, m, seed, step):
    table = make_table([n for n, _ in cohort], [s for _, s in cohort])
    chosen = items(table, SAMPLERS["partition_pairs"](table, seed=seed, n_volumes=m).batch(step))
    assert chosen.partition.tolist() == np.repeat(np.arange(4), m).tolist()
    for volumes in chosen.volume.reshape(4, m):
        assert volumes.tolist() == chosen.volume[:m].tolist()
        assert len(np.unique(volumes)) == m


@given(cohort=cohorts, batch=st.integers(1, 12), seed=seeds, step=st.integers(0, 10_000))
def test_random_batches_are_full_and_repeat_nothing(cohort, batch, seed, step):
    table = make_table([n for n, _ in cohort], [s for _, s in cohort])
    rows = SAMPLERS["random"](table, seed=seed, batch_size=batch).batch(step)
    assert len(np.unique(items(table, rows).row)) == batch


@given(cohort=cohorts, batch=st.integers(1, 60), seed=seeds, step=st.integers(0, 10_000))
def test_few_label_batches_are_balanced_over_volumes_and_repeat_only_what_runs_out(cohort, batch, seed, step):
    table = make_table([n for n, _ in cohort], [s for _, s in cohort])
    rows = SAMPLERS["few_label"](table, seed=seed, batch_size=batch).batch(step)
    assert len(rows) == batch
    drawn = [(items(table, rows).volume == volume).sum() for volume in np.unique(table.volume)]
    assert max(drawn) - min(drawn) <= 1
    for volume in np.unique(table.volume):
        own = table.row[table.volume == volume]
        times = [(rows == row).sum() for row in own]
        assert max(times) - min(times) <= 1


SETTINGS = {
    "random": {"batch_size": 12},
    "partition": {"n_volumes": 3},
    "partition_pairs": {"n_volumes": 3},
    "few_label": {"batch_size": 12},
    "site_balanced": {"attribute": "site", "n_sites": 3, "n_per_site": 4},
    "age_site_balanced": {"attribute": "site", "age": "age", "batch_size": 12, "bin_width": 5.0},
    "cluster_balanced": {"batch_size": 12, "head": 1},
}
TABLE = make_table([8, 9, 10, 11, 8, 8], [0, 0, 1, 1, 2, 3])
PEOPLE = make_table([1] * 40, list(range(40)), n_partitions=1)
PEOPLE.labels.update(site=np.arange(40) % 5, age=20.0 + np.arange(40) % 7)
TABLES = {"site_balanced": PEOPLE, "age_site_balanced": PEOPLE}


@pytest.mark.parametrize("name", SAMPLERS)
@given(seed=seeds, step=st.integers(0, 10_000))
def test_ranks_tile_the_batch_for_every_world_size_and_calls_leave_no_trace(name, seed, step):
    table = TABLES.get(name, TABLE)
    sampler = SAMPLERS[name](table, seed=seed, **SETTINGS[name])
    whole = sampler.batch(step)
    assert whole.dtype == np.int64
    assert len(whole) == sampler.batch_size == 12
    for world_size in (1, 2, 3, 4, 6, 12):
        parts = [sampler.batch(step, rank, world_size) for rank in range(world_size)]
        assert {len(part) for part in parts} == {12 // world_size}
        assert np.concatenate(parts).tolist() == whole.tolist()
    sampler.batch(step + 17)
    again = SAMPLERS[name](table, seed=seed, **SETTINGS[name])
    assert again.batch(step).tolist() == sampler.batch(step).tolist() == whole.tolist()


@pytest.mark.parametrize("name", SAMPLERS)
def test_seeds_and_steps_differ(name):
    table = TABLES.get(name, TABLE)
    sampler = SAMPLERS[name](table, seed=1, **SETTINGS[name])
    batches = {tuple(sampler.batch(step)) for step in range(20)}
    other = {tuple(SAMPLERS[name](table, seed=2, **SETTINGS[name]).batch(step)) for step in range(20)}
    assert len(batches) == 20
    assert not batches & other


def test_random_visits_everything_once_an_epoch():
    sampler = SAMPLERS["random"](TABLE, seed=3, batch_size=9)  # 54 items
    for epoch in range(3):
        rows = np.concatenate([sampler.batch(6 * epoch + k) for k in range(6)])
        assert sorted(rows) == TABLE.row.tolist()


def test_partition_visits_every_volume_once_an_epoch():
    sampler = SAMPLERS["partition"](TABLE, seed=3, n_volumes=2)
    for epoch in range(5):
        volumes = np.concatenate([np.unique(items(TABLE, sampler.batch(3 * epoch + k)).volume) for k in range(3)])
        assert sorted(volumes) == np.unique(TABLE.volume).tolist()


def test_partition_never_pairs_a_subject_with_itself_and_still_uses_all_its_volumes():
    table = make_table([8] * 6, [0, 0, 0, 0, 1, 2])
    sampler = SAMPLERS["partition"](table, seed=0, n_volumes=2)
    seen = set()
    for step in range(60):
        chosen = items(table, sampler.batch(step))
        assert len(np.unique(chosen.subject)) == 2
        seen |= set(chosen.volume)
    assert seen == set(table.volume)


def test_partition_with_too_few_subjects_takes_distinct_volumes():
    table = make_table([8] * 4, [0, 0, 0, 1])
    for step in range(10):
        chosen = items(table, SAMPLERS["partition"](table, seed=0, n_volumes=3).batch(step))
        assert len(np.unique(chosen.volume)) == 3


def test_positions_are_uniform_inside_a_partition_and_never_outside():
    table = make_table([22, 22], [0, 1])  # 5 slices a partition, 2 left over
    sampler = SAMPLERS["partition"](table, seed=5, n_volumes=2)
    rows = np.concatenate([sampler.batch(step) for step in range(500)])
    positions = items(table, rows).position
    counts = np.bincount(positions, minlength=22)
    assert counts[20:].sum() == 0
    # 1000 draws of 5 places: 200 each, standard deviation 12.6
    assert np.abs(counts[:20] - 200).max() < 60


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="more items than there are"):
        SAMPLERS["random"](TABLE, seed=0, batch_size=55)
    with pytest.raises(ConfigError, match="more volumes than there are"):
        SAMPLERS["partition"](TABLE, seed=0, n_volumes=7)
    with pytest.raises(ConfigError, match="at least 2"):
        SAMPLERS["partition_pairs"](TABLE, seed=0, n_volumes=1)
    with pytest.raises(ConfigError, match="at least 1"):
        SAMPLERS["few_label"](TABLE, seed=0, batch_size=0)
    with pytest.raises(ConfigError, match="negative"):
        SAMPLERS["random"](TABLE, seed=-1, batch_size=2)
    none = ItemTable(TABLE.row, TABLE.subject, TABLE.volume, np.full(len(TABLE), -1), TABLE.position)
    with pytest.raises(ConfigError, match="partitions"):
        SAMPLERS["partition"](none, seed=0, n_volumes=2)
    lacking = TABLE.select(~((TABLE.volume == 4) & (TABLE.partition == 2)))
    with pytest.raises(InputError, match="volume 4 .* partition 2"):
        SAMPLERS["partition"](lacking, seed=0, n_volumes=2)
    with pytest.raises(InputError, match="no item"):
        SAMPLERS["few_label"](TABLE.select(TABLE.row < 0), seed=0, batch_size=2)


def test_impossible_batches_are_refused():
    sampler = SAMPLERS["random"](TABLE, seed=0, batch_size=12)
    with pytest.raises(ConfigError, match="divided evenly"):
        sampler.batch(0, 0, 5)
    for step, rank in ((-1, 0), (0, 2), (0, -1)):
        with pytest.raises(InputError, match="no such batch"):
            sampler.batch(step, rank, 2)


def test_every_config_builds_its_sampler_from_its_name():
    adapter = TypeAdapter(tagged_union(SAMPLERS))
    for name in SAMPLERS:
        config = adapter.validate_python({"name": name})
        sampler = SAMPLERS[name](TABLES.get(name, TABLE), seed=0, **config.model_dump(exclude={"name"}))
        assert isinstance(config, sampler.config)
        assert config.name == name
