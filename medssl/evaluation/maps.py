"""Embeddings flattened to two dimensions, to be looked at: never evidence by themselves."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.preprocessing import StandardScaler

from medssl.evaluation.probes import Floats, features

FEWEST: Final = 5
"""Rows below which a map shows nothing."""
_PERPLEXITY: Final = 30.0


def flat_maps(X: npt.ArrayLike, *, seed: int = 0) -> dict[str, Floats]:
    """PCA and t-SNE of standardised features; the same rows and seed give the same map.

    Args:
        X: (n, F) features.
        seed: Of t-SNE, which starts from the PCA.

    Returns:
        ``pca`` and ``tsne``, each (n, 2); empty below `FEWEST` rows.

    Raises:
        InputError: Values that are not finite.
    """
    X = features(X)
    if len(X) < FEWEST:
        return {}
    values = StandardScaler().fit_transform(X)
    if values.shape[1] == 1:  # a line; both need a second axis
        values = np.hstack([values, np.zeros_like(values)])
    perplexity = min(_PERPLEXITY, (len(values) - 1) / 3)
    flat = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(values)
    return {"pca": PCA(2, svd_solver="full").fit_transform(values), "tsne": flat.astype(np.float64)}
