import threading
import time

import pytest
import torch
from training_toy import N_ITEMS, ToyReader, ToySampler, toy_source

from medssl.core.errors import ConfigError, DataError
from medssl.core.types import ViewBatch
from medssl.training.source import BatchSource
from medssl.transforms.views import ViewsConfig


def tensors(batch: ViewBatch) -> list[torch.Tensor]:
    geometry = [theta for theta in batch.geometry if theta is not None]
    return [*batch.views, *geometry, *batch.items.values(), *batch.labels.values()]


def equal(one: ViewBatch, two: ViewBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(two), strict=True))


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("prefetch", [2, 4])
def test_any_number_of_workers_gives_the_same_batches(workers, prefetch):
    inline = toy_source()
    source = toy_source(workers=workers, prefetch=prefetch)
    for step in range(8):
        assert equal(inline.batch(step), source.batch(step, until=8))
    source.close()


def test_a_batch_depends_on_its_step_alone():
    source = toy_source(workers=2)
    third = source.batch(3, until=20)
    source.batch(9, until=20)
    source.batch(1, until=20)
    assert equal(third, source.batch(3, until=20))
    assert equal(third, toy_source().batch(3))
    assert not equal(third, toy_source(seed=1).batch(3))
    source.close()


def test_processes_share_one_global_batch():
    views = ViewsConfig(n_views=2, preset="simclr")
    whole = toy_source(views=views).batch(4)
    parts = [toy_source(views=views, rank=rank, world_size=2).batch(4) for rank in (0, 1)]
    for view in (0, 1):
        torch.testing.assert_close(torch.cat([p.views[view] for p in parts]), whole.views[view], rtol=0, atol=0)
    for name, column in whole.items.items():
        torch.testing.assert_close(torch.cat([part.items[name] for part in parts]), column, rtol=0, atol=0)
    assert whole.items["slot"].tolist() == list(range(6))
    with pytest.raises(ConfigError, match="4 processes"):
        toy_source(world_size=4)


def test_items_and_labels_belong_to_the_rows():
    batch = toy_source(views=ViewsConfig(n_views=1, original=True)).batch(2)
    rows = ToySampler().batch(2)
    assert batch.items["row"].tolist() == rows.tolist()
    assert batch.items["subject"].tolist() == (rows // 3).tolist()
    reader = ToyReader()
    torch.testing.assert_close(batch.views[0], reader.images[torch.as_tensor(rows)], rtol=0, atol=0)
    assert batch.labels["age"].tolist() == reader.table.labels["age"][rows].tolist()
    assert (batch.step, batch.seed) == (2, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_fails_in_a_worker_names_its_items(workers):
    source = toy_source(workers=workers)
    source.reader.fail_at = int(ToySampler().batch(1)[2])
    source.batch(0, until=3)
    with pytest.raises(DataError) as caught:
        source.batch(1, until=3)
    assert f"row {source.reader.fail_at}: case" in str(caught.value)
    assert "cannot read row" in str(caught.value)
    source.close()


def test_a_worker_that_hangs_is_given_up_and_does_not_keep_the_process():
    class Slow(ToyReader):
        def read(self, rows):
            time.sleep(30)
            return super().read(rows)

    source = toy_source(reader=Slow(), workers=1, timeout_s=0.2)
    with pytest.raises(DataError, match="not ready after 0.2 s"):
        source.batch(0)
    assert all(t.daemon for t in threading.enumerate() if t.name.startswith("medssl-batch"))


def test_nothing_is_prepared_at_or_beyond_the_horizon():
    class Counting(ToySampler):
        def __init__(self):
            super().__init__()
            self.asked = set()

        def batch(self, step, rank=0, world_size=1):
            self.asked.add(step)
            return super().batch(step, rank, world_size)

    sampler = Counting()
    source = toy_source(sampler=sampler, workers=2, prefetch=4)
    for step in range(4):
        source.batch(step, until=5)
    time.sleep(0.2)
    assert max(sampler.asked) == 4
    source.close()


def test_a_new_sampler_drops_what_was_prepared_ahead():
    source = toy_source(workers=2)
    source.batch(0, until=10)
    source.replace_sampler(ToySampler(seed=5))
    assert equal(source.batch(1, until=10), toy_source(sampler=ToySampler(seed=5)).batch(1))
    source.close()


def test_label_maps_move_with_view_0():
    class Labelled(ToyReader):
        def read(self, rows):
            images, _ = super().read(rows)
            return images, (images[:, 0] > 0.5).long()

    views = ViewsConfig(n_views=1, original=True)
    source = BatchSource(ToySampler(), Labelled(), views, seed=0)
    batch = source.batch(0)
    torch.testing.assert_close(batch.labels["label_map"], (batch.views[0][:, 0] > 0.5).long(), rtol=0, atol=0)


def test_plain_images_come_without_augmentation():
    source = toy_source()
    torch.testing.assert_close(source.plain(range(N_ITEMS)), source.reader.images, rtol=0, atol=0)


def test_threads_of_the_training_step_stay_as_they_were():
    before = torch.get_num_threads()
    source = toy_source(workers=2)
    source.batch(0, until=4)
    toy_source().batch(0)
    assert torch.get_num_threads() == before
    source.close()
