"""Maps to look at: the same every time, and none of too few people."""

import numpy as np

from medssl.evaluation.maps import flat_maps


def test_maps_are_repeatable_and_do_not_depend_on_units():
    X = np.random.default_rng(0).standard_normal((20, 3))
    one, other = flat_maps(X), flat_maps(X * [1, 100, 1e-3] + 5)
    assert {name: xy.shape for name, xy in one.items()} == {"pca": (20, 2), "tsne": (20, 2)}
    np.testing.assert_allclose(one["pca"], other["pca"], atol=1e-9)
    np.testing.assert_array_equal(one["tsne"], flat_maps(X)["tsne"])


def test_one_feature_is_a_line_and_too_few_people_are_no_map():
    maps = flat_maps(np.arange(8.0)[:, None])
    assert np.allclose(maps["pca"][:, 1], 0)
    assert np.isfinite(maps["tsne"]).all()
    assert flat_maps(np.ones((4, 3))) == {}
