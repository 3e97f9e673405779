"""nt_xent and global_contrastive against loops written from their formulas, and their laws."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from medssl.core.errors import InputError, ShapeError
from medssl.losses import EmptyComparisonWarning, global_contrastive, nt_xent

TAU = 0.1
pytestmark = pytest.mark.filterwarnings("ignore::medssl.losses.EmptyComparisonWarning")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def value_and_grad(loss, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    value.backward()
    return value.detach(), *(leaf.grad for leaf in leaves)


def pair_term(anchor: Tensor, positive: Tensor, negatives: list[Tensor], tau: float = TAU) -> Tensor:
    def e(other: Tensor) -> Tensor:
        return torch.exp(torch.dot(anchor, other) / (anchor.norm() * other.norm() * tau))

    return -torch.log(e(positive) / (e(positive) + sum(e(k) for k in negatives)))


def loop_nt_xent(z1: Tensor, z2: Tensor, tau: float = TAU) -> Tensor:
    rows, n = [*z1, *z2], len(z1)
    terms = []
    for a in range(2 * n):
        p = (a + n) % (2 * n)
        terms.append(pair_term(rows[a], rows[p], [rows[k] for k in range(2 * n) if k not in (a, p)], tau))
    return sum(terms) / (2 * n)


def loop_global(z: Tensor, partition: list[int], volume: list[int], strategy: str, tau: float = TAU) -> Tensor:
    n = len(z)
    pairs = []  # unordered pairs of (item, version)
    for i in range(n):
        pairs += [((i, 0), (i, 1)), ((i, 0), (i, 2)), ((i, 1), (i, 2))]
    if strategy == "gd":
        for i in range(n):
            for j in range(n):
                if partition[i] == partition[j] and volume[i] != volume[j]:
                    if i < j:
                        pairs.append(((i, 0), (j, 0)))
                    pairs.append(((i, 1), (j, 2)))
    terms = []
    for a, b in pairs + [(b, a) for a, b in pairs]:
        others = [z[k, v] for k in range(n) for v in range(3) if partition[k] != partition[a[0]]]
        terms.append(pair_term(z[a], z[b], others, tau) if others else z.sum() * 0)
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("n", "d", "tau"), [(2, 3, 0.5), (5, 4, 0.1), (9, 16, 0.07)])
def test_nt_xent_value_and_gradient_equal_the_loop(n, d, tau):
    z1, z2 = randn(n, d, seed=1), randn(n, d, seed=2)
    ours = value_and_grad(lambda a, b: nt_xent(a, b, temperature=tau), z1, z2)
    loop = value_and_grad(lambda a, b: loop_nt_xent(a, b, tau), z1, z2)
    for got, expected in zip(ours, loop):
        assert_close(got, expected, rtol=1e-10, atol=1e-12)


PARTITIONS = {
    "3 volumes x 4 partitions": ([0, 1, 2, 3] * 3, [7] * 4 + [2] * 4 + [5] * 4),
    "uneven": ([0, 0, 1, 1, 1, 2], [0, 1, 0, 1, 2, 0]),
    "two items of one volume at one partition": ([0, 0, 0, 1, 1], [0, 0, 1, 0, 1]),
    "one volume": ([0, 1, 2], [4, 4, 4]),
}


@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize("strategy", ["gd-", "gd"])
def test_global_contrastive_value_and_gradient_equal_the_loop(name, strategy):
    partition, volume = PARTITIONS[name]
    z = randn(len(partition), 3, 6, seed=3)
    p, v = torch.tensor(partition), torch.tensor(volume)
    ours = value_and_grad(lambda x: global_contrastive(x, p, v, strategy=strategy), z)
    loop = value_and_grad(lambda x: loop_global(x, partition, volume, strategy), z)
    for got, expected in zip(ours, loop):
        assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_gr_equals_nt_xent():
    z = randn(6, 2, 5)
    assert_close(global_contrastive(z, strategy="gr"), nt_xent(z[:, 0], z[:, 1]))


def test_equal_embeddings_give_the_closed_forms():
    z = torch.ones(6, 3, 4, dtype=torch.float64)
    assert_close(nt_xent(z[:, 0], z[:, 1]), torch.tensor(math.log(11), dtype=torch.float64))
    partition, volume = torch.tensor([0, 1, 2] * 2), torch.tensor([0] * 3 + [1] * 3)
    for strategy in ("gd-", "gd"):  # one positive and 4 items x 3 rows elsewhere
        value = global_contrastive(z, partition, volume, strategy=strategy)
        assert_close(value, torch.tensor(math.log(13), dtype=torch.float64))


def test_gradcheck():
    z1, z2 = randn(4, 3, seed=4).requires_grad_(), randn(4, 3, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, temperature=0.5), (z1, z2))
    z = randn(4, 3, 3, seed=6).requires_grad_()
    p, v = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
    for strategy in ("gd-", "gd"):
        assert torch.autograd.gradcheck(
            lambda x, s=strategy: global_contrastive(x, p, v, strategy=s, temperature=0.5), (z,)
        )


@given(n=st.integers(1, 12), d=st.integers(1, 24), seed=st.integers(0, 2**31 - 1))
def test_nt_xent_ignores_row_order_scale_and_view_order(n, d, seed):
    z1, z2 = randn(2, n, d, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for a, b in ((z1[order], z2[order]), (3 * z1, z2), (z2, z1)):
        assert_close(nt_xent(a, b), nt_xent(z1, z2), rtol=1e-9, atol=1e-9)


@given(
    codes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=10),
    strategy=st.sampled_from(["gd-", "gd"]),
    seed=st.integers(0, 2**31 - 1),
)
def test_global_contrastive_ignores_order_scale_and_the_names_of_codes(codes, strategy, seed):
    partition, volume = torch.tensor(codes).T
    z = randn(len(codes), 3, 5, seed=seed)
    value = global_contrastive(z, partition, volume, strategy=strategy)
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed))
    for changed in (
        global_contrastive(z[order], partition[order], volume[order], strategy=strategy),
        global_contrastive(
            z * torch.rand(len(codes), 3, 1, dtype=z.dtype).add(0.1), partition, volume, strategy=strategy
        ),
        global_contrastive(z, 17 - 3 * partition, 100 + volume, strategy=strategy),
        global_contrastive(z[:, [0, 2, 1]], partition, volume, strategy=strategy),
    ):
        assert_close(changed, value, rtol=1e-9, atol=1e-9)


def test_a_large_temperature_or_small_one_stays_finite():
    z = randn(8, 3, 16, dtype=torch.float32)
    p, v = torch.arange(8) % 2, torch.arange(8) // 2
    for tau in (1e-3, 1e3):
        for value, grad in (
            value_and_grad(lambda x, t=tau: nt_xent(x[:, 0], x[:, 1], temperature=t), z),
            value_and_grad(lambda x, t=tau: global_contrastive(x, p, v, strategy="gd", temperature=t), z),
        ):
            assert torch.isfinite(value)
            assert torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_result_under_autocast_is_the_float32_result(dtype):
    z = randn(8, 3, 32).to(dtype)
    p, v = torch.arange(8) % 2, torch.arange(8) // 2
    with torch.autocast("cpu", dtype=dtype):
        nt, gd = nt_xent(z[:, 0], z[:, 1]), global_contrastive(z, p, v, strategy="gd")
    assert nt.dtype == gd.dtype == torch.float32
    wide = z.double()
    assert_close(nt.double(), nt_xent(wide[:, 0], wide[:, 1]), rtol=1e-5, atol=1e-5)
    assert_close(gd.double(), global_contrastive(wide, p, v, strategy="gd"), rtol=1e-5, atol=1e-5)


def test_a_batch_of_one_gives_zero_with_zero_gradient_and_says_so():
    z1, z2 = randn(1, 4, seed=1), randn(1, 4, seed=2)
    with pytest.warns(EmptyComparisonWarning, match="batch of one"):
        value, g1, g2 = value_and_grad(nt_xent, z1, z2)
    assert value == 0
    assert g1.abs().sum() == g2.abs().sum() == 0


@pytest.mark.parametrize("strategy", ["gd-", "gd"])
def test_a_batch_of_one_partition_gives_zero_with_zero_gradient_and_says_so(strategy):
    p, v = torch.zeros(4, dtype=torch.int64), torch.arange(4)
    with pytest.warns(EmptyComparisonWarning, match="one partition"):
        value, grad = value_and_grad(lambda x: global_contrastive(x, p, v, strategy=strategy), randn(4, 3, 5))
    assert value == 0
    assert grad.abs().sum() == 0


def test_gradient_under_autocast_reaches_half_precision_embeddings():
    z, p, v = randn(8, 3, 32), torch.arange(8) % 2, torch.arange(8) // 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, half = value_and_grad(lambda x: global_contrastive(x, p, v, strategy="gd"), z.bfloat16())
    _, wide = value_and_grad(lambda x: global_contrastive(x, p, v, strategy="gd"), z.bfloat16().double())
    assert half.dtype == torch.bfloat16
    assert (half.double() - wide).abs().max() < 2**-7 * wide.abs().max()  # one rounding to bfloat16 at the end


@pytest.mark.parametrize("scale", [0.0, 1e-14])
def test_embeddings_without_direction_have_gradient_zero_and_leave_the_others_finite(scale):
    z = randn(6, 3, 4)
    z[2, 1] = z[2, 1] * scale
    p, v = torch.arange(6) % 3, torch.arange(6) // 3
    for loss in (
        lambda x: nt_xent(x[:, 1], x[:, 2]),
        lambda x: global_contrastive(x, p, v, strategy="gd"),
    ):
        value, grad = value_and_grad(loss, z)
        assert torch.isfinite(value)
        assert torch.isfinite(grad).all()
        assert grad[2, 1].abs().sum() == 0
        assert grad[3, 1].abs().sum() > 0


def test_wrong_inputs_are_refused_with_a_remedy():
    z = randn(4, 3, 5)
    p = v = torch.arange(4)
    with pytest.raises(ShapeError, match="one shape"):
        nt_xent(z[:, 0], z[:3, 1])
    with pytest.raises(ShapeError, match=r"\(N, D\)"):
        nt_xent(z, z)
    with pytest.raises(InputError, match="temperature"):
        nt_xent(z[:, 0], z[:, 1], temperature=0.0)
    with pytest.raises(InputError, match="floating"):
        nt_xent(torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.int64))
    for strategy in ("gd-", "gd"):
        with pytest.raises(ShapeError, match="needs `partition`"):
            global_contrastive(z, None, v, strategy=strategy)
        with pytest.raises(ShapeError, match="one code per item"):
            global_contrastive(z, p[:3], v, strategy=strategy)
        with pytest.raises(ShapeError, match="one code per item"):
            global_contrastive(z, p, v[:3], strategy=strategy)
    with pytest.raises(ShapeError, match="needs `volume`"):
        global_contrastive(z, p, strategy="gd")
    assert global_contrastive(z, p, strategy="gd-") == global_contrastive(z, p, v, strategy="gd-")
    with pytest.raises(ShapeError, match="3 views"):
        global_contrastive(z[:, :2], p, v, strategy="gd")
    with pytest.raises(InputError, match="Did you mean `gd`"):
        global_contrastive(z, p, v, strategy="gd_")
    with pytest.raises(InputError, match="integer codes"):
        global_contrastive(z, p.float(), v, strategy="gd")
