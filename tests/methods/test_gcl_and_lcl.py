import pytest
import torch
from method_examples import SIZE, Example, make_batch, train
from torch.testing import assert_close

from medssl.core.errors import ConfigError, ShapeError
from medssl.core.types import ModelParts
from medssl.losses import global_contrastive, local_contrastive, nearest_negatives, region_corners
from medssl.methods import METHODS
from medssl.methods.gcl import GCLConfig
from medssl.methods.lcl import LCLConfig
from medssl.models import build_decoder, build_encoder
from medssl.models.encoders import UNet2dConfig


def gcl(**settings) -> Example:
    return Example(METHODS["gcl"], GCLConfig(**settings), 2)


def lcl(norm: str = "group", **settings) -> Example:
    return Example(METHODS["lcl"], LCLConfig(**settings), 2, norm)


def test_gcl_asks_for_the_original_and_the_partition_sampler_only_where_it_compares_partitions():
    for strategy in ("gd-", "gd"):
        needs = GCLConfig(strategy=strategy).needs()
        assert (needs.views, needs.original, needs.partitions) == (3, True, True)
        assert needs.samplers == {"partition"}
    needs = GCLConfig(strategy="gr").needs()
    assert (needs.views, needs.original, needs.partitions, needs.samplers) == (2, False, False, frozenset())


@pytest.mark.parametrize("pool", ["flatten", "avg"])
def test_gcl_is_the_global_contrast_of_projected_coarsest_maps(pool):
    case = gcl(strategy="gd", pool=pool, temperature=0.2)
    method, batch = case.build(), make_batch(case, 0)
    z = []
    for view in batch.views:
        coarsest = method.encoder.feature_maps(view)[-1]
        h = coarsest.flatten(1) if pool == "flatten" else coarsest.mean((2, 3))
        first, _, second = method.head.project
        z.append(torch.relu(h @ first.weight.T) @ second.weight.T)
    expected = global_contrastive(
        torch.stack(z, 1), batch.items["partition"], batch.items["volume"], strategy="gd", temperature=0.2
    )
    assert_close(method.training_loss(batch).loss, expected)


def test_the_gcl_head_is_the_papers_and_has_no_biases():
    encoder = build_encoder(UNet2dConfig(preset="gcl"), (1, 64, 64))
    head = METHODS["gcl"].build(GCLConfig(), ModelParts(encoder, None, (1, 64, 64))).head
    assert [tuple(p.shape) for p in head.parameters()] == [(1024, 128 * 2 * 2), (128, 1024)]


def test_building_a_head_leaves_running_statistics_and_mode_alone():
    encoder = build_encoder(UNet2dConfig(widths=(4, 4), norm="batch"), (1, 16, 16)).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    METHODS["gcl"].build(GCLConfig(), ModelParts(encoder, None, (1, 16, 16)))
    METHODS["lcl"].build(LCLConfig(freeze_encoder=False), ModelParts(encoder, build_decoder(encoder), (1, 16, 16)))
    assert encoder.training
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_a_flattening_head_refuses_views_of_another_size():
    case = gcl(strategy="gr")
    with pytest.raises(ShapeError, match=r"method\.pool: avg"):
        case.build().head(torch.zeros(1, 8, 5, 5))


@pytest.mark.parametrize("region_features", [None, 16])
def test_lcl_is_the_local_contrast_of_regions_of_the_projected_map(region_features):
    case = lcl(strategy="lr", region_features=region_features)
    method, batch = case.build(), make_batch(case, 0)
    maps = [method.head.out(method.head.hidden(method.decoder(method.encoder.feature_maps(v)))) for v in batch.views]
    corners = region_corners(SIZE[2], 3)
    if region_features is None:
        expected = local_contrastive(*maps, corners, region_size=3, negatives=nearest_negatives(corners, 5))
    else:
        # The map of a region written out: its 3 x 3 voxels, flattened, times one matrix.
        matrix = method.head.region.weight.flatten(1)
        patches = [torch.stack([m[:, :, x : x + 3, y : y + 3].flatten(1) for x, y in corners], 2) for m in maps]
        vectors = [torch.einsum("of,nfr->nor", matrix, p)[..., None] for p in patches]  # a map of R x 1 voxels
        line = torch.stack([torch.arange(len(corners)), torch.zeros(len(corners), dtype=torch.int64)], 1)
        place = {tuple(c): i for i, c in enumerate(corners.tolist())}
        table = torch.tensor([[[place[tuple(c)], 0] for c in row] for row in nearest_negatives(corners, 5).tolist()])
        expected = local_contrastive(*vectors, line, region_size=1, negatives=table)
    assert_close(method.training_loss(batch).loss, expected)


@pytest.mark.parametrize("freeze", [True, False])
def test_a_frozen_encoder_keeps_its_weights_and_statistics(freeze):
    case = lcl("batch", freeze_encoder=freeze)
    method = case.build()
    before = {name: value.clone() for name, value in method.encoder.state_dict().items()}
    train(case, method.train(), 2)
    moved = [name for name, value in method.encoder.state_dict().items() if not torch.equal(value, before[name])]
    assert bool(moved) != freeze
    assert method.encoder.training != freeze
    assert method.decoder.training


def test_random_regions_are_distinct_and_come_from_seed_and_step():
    method = lcl(regions="random").build()
    first = method.corners(1, 2)
    assert torch.equal(first, method.corners(1, 2))
    assert not torch.equal(first, method.corners(1, 3))
    assert len(first.unique(dim=0)) == 13
    assert int(first.min()) >= 0
    assert int(first.max()) <= SIZE[2][0] - 3


@pytest.mark.parametrize(
    ("dims", "regions", "n"), [(2, "full", 13), (2, "outer", 9), (3, "full", 35), (3, "outer", 27)]
)
def test_numbers_of_regions_are_the_papers_and_their_3d_forms(dims, regions, n):
    method = Example(METHODS["lcl"], LCLConfig(regions=regions), dims).build()
    assert len(method.corners(0, 0)) == n


def test_lcl_refuses_parts_that_do_not_fit():
    encoder = build_encoder(UNet2dConfig(widths=(4, 4, 4, 4)), (1, 16, 16))
    with pytest.raises(ConfigError, match="no decoder"):
        METHODS["lcl"].build(LCLConfig(), ModelParts(encoder, None, (1, 16, 16)))
    tiny = build_encoder(UNet2dConfig(widths=(4, 4, 4), strides=((2, 2), (2, 2))), (1, 4, 4))
    parts = ModelParts(tiny, build_decoder(tiny, blocks=1), (1, 4, 4))
    with pytest.raises(ConfigError, match="smaller than a region"):
        METHODS["lcl"].build(LCLConfig(), parts)
    with pytest.raises(ConfigError, match=r"method\.n_negatives"):
        METHODS["lcl"].build(LCLConfig(region_size=1), parts)
