"""Batches in which people of the same site and of different sites meet: what debiasing by site compares."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, PositiveFloat

from medssl.core import seeding
from medssl.core.errors import ConfigError, InputError, nearest
from medssl.core.schema import StrictModel
from medssl.core.types import Ints, ItemTable
from medssl.samplers.base import EPOCH, STEP, Sampler, check_count

GROUP = 4
"""Items of `AgeSiteBalancedSampler` that are drawn together: two of each of two sites."""


class SiteBalancedConfig(StrictModel):
    """Settings of `SiteBalancedSampler`."""

    name: Literal["site_balanced"] = "site_balanced"
    attribute: str = "site"
    """Column of the manifest whose values are balanced."""
    n_sites: Annotated[int, Field(ge=2)] = 4
    """Sites in a global batch."""
    n_per_site: Annotated[int, Field(ge=2)] = 8
    """People of each; times n_sites gives the size of the batch."""


class AgeSiteBalancedConfig(StrictModel):
    """Settings of `AgeSiteBalancedSampler`."""

    name: Literal["age_site_balanced"] = "age_site_balanced"
    attribute: str = "site"
    """Column of the manifest that holds the site."""
    age: str = "age"
    """Column of the manifest that holds the age, or any other number that paired people should share."""
    batch_size: Annotated[int, Field(ge=GROUP, multiple_of=GROUP)] = 32
    """Items in a global batch, four for each person in turn."""
    bin_width: PositiveFloat = 5.0
    """Largest difference in age (years) inside a group of four, wherever such people exist."""


class SiteBalancedSampler(Sampler):
    """``n_sites`` sites, ``n_per_site`` people of each, one item of each person; nobody twice in a batch.

    Sites come in random order, each once a round of ceil(sites / n_sites) batches; the last batch of a round is filled
    up with others. A site deals its people in random order, each once before any comes again (a few left over, others
    each time), so that people of small sites are seen more often. A site with fewer people than its places gives all
    of them, and the rest goes to the other sites of the batch and then to further ones. A site with one person thus
    takes part, but is only ever compared with other sites. Every batch holds two people of one site and people of two
    sites.

    Args:
        table: The items to choose from.
        seed: The run's seed.
        attribute: Column of ``table.labels``.
        n_sites: At least 2.
        n_per_site: At least 2.

    Raises:
        ConfigError: No such column, fewer sites or people than a batch needs, or no site with two people.
        InputError: An item without a site.
    """

    config: ClassVar[type[StrictModel]] = SiteBalancedConfig

    def __init__(self, table: ItemTable, *, seed: int, attribute: str, n_sites: int, n_per_site: int) -> None:
        super().__init__(table, seed=seed)
        check_count("n_sites", n_sites, 2)
        check_count("n_per_site", n_per_site, 2)
        self.n_sites, self.n_per_site, self.batch_size = n_sites, n_per_site, n_sites * n_per_site
        site = _sites(table, attribute, at_least=n_sites)
        _check_people(table, site, attribute, self.batch_size)
        self._people = [np.unique(table.subject[site == s]) for s in range(int(site.max()) + 1)]
        self._several = np.array([len(people) > 1 for people in self._people])
        order = np.lexsort((table.row, table.subject, site))
        self._rows = table.row[order]
        pairs = np.stack([site[order], table.subject[order]], axis=1)
        keys, first, count = np.unique(pairs, axis=0, return_index=True, return_counts=True)
        self._items = {(int(s), int(p)): (int(f), int(c)) for (s, p), f, c in zip(keys, first, count)}

    def _global_batch(self, step: int) -> Ints:
        rng = self._rng(STEP, step)
        waiting = self._queues(step, rng)
        active, waiting = waiting[: self.n_sites], waiting[self.n_sites :]
        taken: dict[int, int] = {}  # person -> site
        n_taken = Counter[int]()  # site -> people
        while len(taken) < self.batch_size:
            site, queue = active.pop(min(range(len(active)), key=lambda k: n_taken[active[k][0]]))
            queue = [person for person in queue if person not in taken]
            # Two at once until the batch has a pair of one site: later there may be no place for it.
            at_once = 1 if max(n_taken.values(), default=0) > 1 else 2
            n = min(at_once, len(queue), self.batch_size - len(taken))
            taken |= dict.fromkeys(queue[:n], site)
            n_taken[site] += n
            if len(queue) > n:
                active.append((site, queue[n:]))
            elif waiting:
                active.append(waiting.pop(0))
        return np.array([self._item(site, person, rng) for person, site in taken.items()], dtype=np.int64)

    def _queues(self, step: int, rng: np.random.Generator) -> list[tuple[int, list[int]]]:
        """Every site with its people in the order in which they are taken: first the sites whose turn it is.

        The others follow at random, those with several people first, because a batch must hold two of one site.
        """
        per_round = -(-len(self._people) // self.n_sites)
        turn, place = divmod(step, per_round)
        order = seeding.permutation(len(self._people), self.seed, seeding.SAMPLER, EPOCH, turn)
        planned = order[place * self.n_sites : (place + 1) * self.n_sites]
        others = rng.permutation(np.setdiff1d(order, planned))
        others = others[np.argsort(~self._several[others], kind="stable")]
        dealt = [(int(s), self._deal(int(s), turn)) for s in planned]
        return dealt + [(int(s), rng.permutation(self._people[s]).tolist()) for s in others]

    def _deal(self, site: int, turn: int) -> list[int]:
        """People of a site, beginning with those whose turn it is."""
        people = self._people[site]
        epoch, place = divmod(turn, max(1, len(people) // self.n_per_site))
        order = seeding.permutation(len(people), self.seed, seeding.SAMPLER, EPOCH, epoch, site)
        dealt: list[int] = np.roll(people[order], -place * self.n_per_site).tolist()
        return dealt

    def _item(self, site: int, person: int, rng: np.random.Generator) -> int:
        first, count = self._items[site, person]
        return int(self._rows[first + rng.integers(count)])


class AgeSiteBalancedSampler(Sampler):
    """Groups of four people of about one age, two of each of two sites; nobody twice in a batch.

    Every item is the first of a group once an epoch (where two of a person would meet in a batch, one is replaced).
    The second is of its site; the third of another, which is drawn evenly from those that have somebody of the age; the
    fourth of the third's. Each is drawn from the people within ``bin_width`` of the first, or is the closest in age
    where nobody is. Where nobody of its site is left, the other three are of one other site. Every batch holds two
    people of one site and people of two sites.

    Args:
        table: The items to choose from.
        seed: The run's seed.
        attribute: Column of ``table.labels`` with the site.
        age: Column of ``table.labels`` with numbers.
        batch_size: A multiple of 4.
        bin_width: In the unit of ``age``.

    Raises:
        ConfigError: No such column, ages that are text, one site, fewer people than a batch, or no site with two.
        InputError: An item without site or age.
    """

    config: ClassVar[type[StrictModel]] = AgeSiteBalancedConfig

    def __init__(
        self, table: ItemTable, *, seed: int, attribute: str, age: str, batch_size: int, bin_width: float
    ) -> None:
        super().__init__(table, seed=seed)
        check_count("batch_size", batch_size, GROUP)
        if batch_size % GROUP:
            raise ConfigError(f"batch_size must be a multiple of {GROUP}", found=str(batch_size))
        if not bin_width > 0:
            raise ConfigError("bin_width must be above 0", found=str(bin_width))
        self.batch_size, self.bin_width = batch_size, bin_width
        self._site = _sites(table, attribute, at_least=2)
        _check_people(table, self._site, attribute, batch_size)
        self._age = _numbers(table, age)

    def _global_batch(self, step: int) -> Ints:
        rng = self._rng(STEP, step)
        free = np.ones(len(self.table), dtype=bool)
        first = [self._take(i, free, rng) for i in self._chunk(len(self.table), self.batch_size // GROUP, step)]
        chosen = [i for anchor in first for i in (anchor, *self._others(anchor, free, rng))]
        return self.table.row[chosen]

    def _take(self, item: int, free: npt.NDArray[np.bool_], rng: np.random.Generator) -> int:
        """Reserve an item's person; if that one is in the batch already, another person's item takes its place."""
        item = int(item) if free[item] else int(rng.choice(np.flatnonzero(free)))
        free[self.table.subject == self.table.subject[item]] = False
        return item

    def _others(self, anchor: int, free: npt.NDArray[np.bool_], rng: np.random.Generator) -> list[int]:
        site, age = self._site, self._age[anchor]
        own = site == site[anchor]
        alone = not (free & own).any()
        second = self._near(age, _prefer(free, self._shared(free) if alone else own), free, rng)
        third = self._near(age, _prefer(free, site == site[second] if alone else ~own), free, rng)
        fourth = self._near(age, _prefer(free, site == site[third]), free, rng)
        return [second, third, fourth]

    def _near(
        self, age: float, wanted: npt.NDArray[np.bool_], free: npt.NDArray[np.bool_], rng: np.random.Generator
    ) -> int:
        """Reserve one of the wanted items: of a site drawn evenly, of the age, or else the closest to it."""
        apart = np.abs(self._age - age)
        near = np.flatnonzero(wanted & (apart <= self.bin_width))
        if len(near) == 0:
            near = np.flatnonzero(wanted & (apart == apart[wanted].min()))
        near = near[self._site[near] == rng.choice(np.unique(self._site[near]))]
        return self._take(int(rng.choice(near)), free, rng)

    def _shared(self, free: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Items of sites that have two people left."""
        pairs = np.unique(np.stack([self._site[free], self.table.subject[free]]), axis=1)
        people = np.bincount(pairs[0], minlength=int(self._site.max()) + 1)
        return np.asarray(people[self._site] > 1)


def _prefer(items: npt.NDArray[np.bool_], wish: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The items that fulfil a wish, or all where none does."""
    both = items & wish
    return both if both.any() else items


def _column(table: ItemTable, name: str) -> npt.NDArray[Any]:
    if name not in table.labels:
        raise ConfigError(
            f"the sampler needs the column `{name}`, which the manifest lacks or leaves empty",
            found=", ".join(table.labels) or "no columns beside the images",
            fix=nearest(name, table.labels) if table.labels else "add it to the manifest",
        )
    values = table.labels[name]
    missing = np.isnan(values) if values.dtype.kind == "f" else values < 0
    if missing.any():
        volumes = np.unique(table.volume[missing])
        raise InputError(
            f"`{name}` is missing for {len(volumes)} volumes",
            where=f"volumes (rows of the manifest) {', '.join(map(str, volumes[:10]))}",
            fix="fill the cells, or leave the volumes out",
        )
    return values


def _sites(table: ItemTable, name: str, *, at_least: int) -> Ints:
    """Codes 0, 1, ... of the values of a column."""
    values, code = np.unique(_column(table, name), return_inverse=True)
    if len(values) < at_least:
        raise ConfigError(
            f"the sampler needs {at_least} values of `{name}` in a batch",
            found=f"{len(values)} in the whole table",
            fix="use the sampler random" if len(values) < 2 else f"set n_sites to at most {len(values)}",
        )
    return code.astype(np.int64)


def _numbers(table: ItemTable, name: str) -> npt.NDArray[np.float64]:
    values = _column(table, name)
    if values.dtype.kind != "f":
        raise ConfigError(f"`{name}` must hold numbers", found="text", fix="name the column that holds the age")
    return values.astype(np.float64)


def _check_people(table: ItemTable, site: Ints, attribute: str, batch_size: int) -> None:
    people = len(np.unique(table.subject))
    if people < batch_size:
        raise ConfigError(
            "a batch needs more people than there are, and nobody is in a batch twice",
            found=f"{batch_size} items in a batch, {people} people",
            fix="choose a smaller batch",
        )
    pairs = np.unique(np.stack([site, table.subject]), axis=1)
    if np.bincount(pairs[0]).max() < 2:
        raise ConfigError(
            f"no value of `{attribute}` is shared by two people, so that nothing can be compared inside one",
            found=f"{len(np.unique(site))} values for {people} people",
            fix="name a column with fewer values",
        )
