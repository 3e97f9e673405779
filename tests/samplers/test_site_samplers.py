"""Every batch of the samplers for debiasing holds pairs of one site and pairs of two, and nobody twice."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.core.errors import ConfigError, InputError
from medssl.core.types import ItemTable
from medssl.samplers import AgeSiteBalancedSampler, SiteBalancedSampler

seeds = st.integers(0, 2**31 - 1)
steps = st.integers(0, 10_000)
# People of each site: many sites have one person only, one has several.
sizes = st.lists(st.integers(1, 12), min_size=2, max_size=9).filter(lambda n: sum(n) >= 8 and max(n) > 1)


def make_people(n_of_site: list[int], *, seed: int = 0, items: int = 1) -> ItemTable:
    """One person per entry, each with ``items`` rows; ages between 20 and 60, in whatever order of the rows."""
    rng = np.random.default_rng(seed)
    site = rng.permutation(np.repeat(np.arange(len(n_of_site)), n_of_site))
    person = np.repeat(np.arange(len(site)), items)
    row = np.arange(len(person))
    return ItemTable(
        row=row + 1000,
        subject=person + 7,
        volume=row,
        partition=np.full(len(row), -1),
        position=np.zeros(len(row), dtype=np.int64),
        labels={"site": site[person], "age": rng.uniform(20, 60, len(site))[person] + row % items},
    )


def chosen(table: ItemTable, rows: np.ndarray) -> ItemTable:
    assert np.isin(rows, table.row).all()
    return table.select(np.searchsorted(table.row, rows))


def site_balanced(table: ItemTable, seed: int = 0, n_sites: int = 2, n_per_site: int = 4) -> SiteBalancedSampler:
    return SiteBalancedSampler(table, seed=seed, attribute="site", n_sites=n_sites, n_per_site=n_per_site)


def age_site(table: ItemTable, seed: int = 0, batch_size: int = 8, bin_width: float = 5.0) -> AgeSiteBalancedSampler:
    return AgeSiteBalancedSampler(
        table, seed=seed, attribute="site", age="age", batch_size=batch_size, bin_width=bin_width
    )


@pytest.mark.parametrize("make", [site_balanced, age_site])
@settings(max_examples=30)
@given(n_of_site=sizes, items=st.integers(1, 3), seed=seeds, step=steps)
def test_every_batch_has_aligned_and_conflicting_pairs_and_nobody_twice(make, n_of_site, items, seed, step):
    table = make_people(n_of_site, seed=seed % 97, items=items)
    batch = chosen(table, make(table, seed).batch(step))
    assert len(np.unique(batch.subject)) == len(batch) == 8
    people_of_site = np.unique(batch.labels["site"], return_counts=True)[1]
    assert people_of_site.max() >= 2
    assert len(people_of_site) >= 2


@pytest.mark.parametrize("make", [site_balanced, age_site])
def test_where_only_one_site_has_two_people_they_are_in_every_batch(make):
    table = make_people([1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1])
    for step in range(50):
        batch = chosen(table, make(table, seed=step).batch(step))
        assert (batch.labels["site"] == 4).sum() == 2


def test_sites_are_balanced_and_come_once_a_round():
    table = make_people([30, 8, 12, 5, 9, 20])
    sampler = site_balanced(table, n_sites=3, n_per_site=4)
    for turn in range(5):
        batches = [chosen(table, sampler.batch(2 * turn + k)).labels["site"] for k in range(2)]
        assert sorted(np.concatenate([np.unique(batch) for batch in batches])) == [0, 1, 2, 3, 4, 5]
        assert all((np.unique(batch, return_counts=True)[1] == 4).all() for batch in batches)


def test_a_small_site_gives_all_its_people_and_the_rest_goes_to_others():
    table = make_people([2, 20, 20])
    for step in range(20):
        site = chosen(table, site_balanced(table, n_sites=3, n_per_site=4).batch(step)).labels["site"]
        assert sorted(np.bincount(site)) == [2, 5, 5]


def test_a_site_deals_all_its_people_before_any_comes_again():
    table = make_people([12, 12], items=2)
    sampler = site_balanced(table, seed=4, n_sites=2, n_per_site=4)
    rows = np.concatenate([sampler.batch(step) for step in range(12)])
    for epoch in range(4):
        people = chosen(table, rows[24 * epoch : 24 * (epoch + 1)]).subject
        assert len(np.unique(people)) == 24
    assert len(np.unique(rows)) > 36  # and not always the same item of a person


def test_every_item_begins_a_group_once_an_epoch():
    table = make_people([10, 10, 4])
    sampler = age_site(table, seed=2)
    first = np.concatenate([sampler.batch(step)[::4] for step in range(12)])
    assert sorted(first) == table.row.tolist()


@pytest.mark.parametrize("make", [site_balanced, age_site])
def test_everybody_is_seen_however_unequal_the_sites_are(make):
    table = make_people([40, 1, 7, 2, 1])
    sampler = make(table)
    assert set(np.concatenate([sampler.batch(step) for step in range(60)])) == set(table.row)


def test_groups_are_two_and_two_of_about_one_age():
    table = make_people([60, 60, 60])
    sampler = age_site(table, batch_size=16, bin_width=4.0)
    for step in range(40):
        batch = chosen(table, sampler.batch(step))
        for site, age in zip(batch.labels["site"].reshape(-1, 4), batch.labels["age"].reshape(-1, 4)):
            assert site[0] == site[1] != site[2] == site[3]
            assert np.abs(age - age[0]).max() <= 4.0


def test_where_nobody_is_of_the_age_the_closest_is_taken():
    table = make_people([2, 2, 2])
    ages = {0: 30.0, 1: 45.0, 2: 80.0}
    table.labels["age"] = np.array([ages[site] for site in table.labels["site"]])
    for step in range(30):
        batch = chosen(table, age_site(table, batch_size=4).batch(step)).labels["site"]
        assert batch.tolist() in ([0, 0, 1, 1], [1, 1, 0, 0], [2, 2, 1, 1])


def test_the_second_site_is_drawn_evenly_from_those_of_the_age():
    table = make_people([4, 90, 10])
    table.labels["age"] = np.full(104, 30.0)
    sampler = age_site(table, batch_size=4)
    first, third = np.array([chosen(table, sampler.batch(step)).labels["site"][[0, 2]] for step in range(400)]).T
    share = (third[first == 1] == 0).mean()
    assert 0.4 < share < 0.6  # by people it would be 4 of 14


def test_impossible_settings_are_refused():
    table = make_people([5, 5, 5])
    with pytest.raises(ConfigError, match="set n_sites to at most 3"):
        site_balanced(table, n_sites=4, n_per_site=2)
    for make in (site_balanced, age_site):
        with pytest.raises(ConfigError, match="1 in the whole table"):
            make(table.select(table.labels["site"] == 1))
        with pytest.raises(ConfigError, match="8 items in a batch, 6 people"):
            make(table.select(np.arange(15) < 6))
        with pytest.raises(ConfigError, match="shared by two people"):
            make(make_people([1] * 9))
        lacking = make_people([5, 5, 5])
        lacking.labels["site"][3] = -1
        with pytest.raises(InputError, match=r"missing for 1 volumes[\s\S]*3"):
            make(lacking)
        with pytest.raises(ConfigError, match="`site`"):
            make(ItemTable(table.row, table.subject, table.volume, table.partition, table.position))
    lacking = make_people([5, 5, 5])
    lacking.labels["age"][[2, 4]] = np.nan
    with pytest.raises(InputError, match="missing for 2 volumes"):
        age_site(lacking)
    with pytest.raises(ConfigError, match="must hold numbers"):
        AgeSiteBalancedSampler(table, seed=0, attribute="site", age="site", batch_size=8, bin_width=5.0)
    with pytest.raises(ConfigError, match="multiple of 4"):
        age_site(table, batch_size=6)
    with pytest.raises(ConfigError, match="above 0"):
        age_site(table, bin_width=0.0)
    with pytest.raises(ConfigError, match="at least 2"):
        site_balanced(table, n_per_site=1)
