"""Predicting one label of a person in a fine-tuning: checks of the target, predictions, their scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import nn

from medssl.core.errors import ConfigError, DataError, nearest
from medssl.data.feature_store import FeatureStore
from medssl.data.features import FeatureStatistics
from medssl.data.items import ItemsConfig
from medssl.data.manifest import Manifest
from medssl.data.splits import LabelDraw
from medssl.data.weak_labels import is_number, named_rows, shortened
from medssl.evaluation.neighbours import classification_metrics, regression_metrics
from medssl.inference import embed_volumes
from medssl.inference.predict import evaluating
from medssl.methods.targets import RegressionConfig, TargetTaskConfig

ROWS: Final = 4096
"""Rows of features in one pass."""


def check_target(task: TargetTaskConfig, pool: Manifest, evaluated: Manifest) -> None:
    """Refuse a target that cannot be learnt or scored.

    Args:
        task: Says which column.
        pool: Rows that training sets are drawn from; those without a target are passed over.
        evaluated: Rows that are scored; all need a target.

    Raises:
        DataError: No such column, no value, text where a number is predicted, one value for everybody; evaluated
            people without a value, or of a class that nobody in ``pool`` has. Names the rows.
    """
    name, by = task.target, "task.target"
    table = pool.table
    if name not in table or not table[name].notna().any():
        filled = [str(column) for column in table if table[column].notna().any()]
        raise DataError(
            f"{by}: the column `{name}` is {'empty for everybody' if name in table else 'not in the manifest'}"
            " who could be trained on",
            where=str(pool.path),
            fix="fill it, read another one under this name with data.map, or name another column. "
            + nearest(name, filled),
        )
    column = table[name].dropna()
    if isinstance(task, RegressionConfig) and not is_number(column):
        raise DataError(
            f"{by}: `{name}` holds text, which regression cannot predict",
            where=str(pool.path),
            found=", ".join(sorted({repr(value) for value in column})[:5]),
            fix="name a column of numbers, or set task: {name: classification, target: " + name + "}",
        )
    missing = evaluated.table[name].isna().to_numpy(dtype=bool)
    if missing.any():
        raise DataError(
            f"{by}: `{name}` is missing for {int(missing.sum())} of the {len(evaluated)} volumes that are evaluated",
            where=f"{evaluated.path}, {named_rows(evaluated, missing)}",
            fix="fill the cells, or leave these people out with data.exclude",
        )
    if column.nunique() == 1:
        raise DataError(
            f"{by}: `{name}` is the same for everybody who could be trained on, so there is nothing to learn",
            where=str(pool.path),
            found=f"{class_name(column.iloc[0])}, {len(column)} volumes",
            fix="name a column in which people differ",
        )
    if isinstance(task, RegressionConfig):
        return
    unknown = (~evaluated.table[name].isin(set(column))).to_numpy(dtype=bool)
    if unknown.any():
        classes = sorted({class_name(value) for value in evaluated.table[name][unknown]})
        raise DataError(
            f"{by}: people are evaluated of a class that nobody who could be trained on has",
            where=f"{evaluated.path}, {named_rows(evaluated, unknown)}",
            found=shortened(classes),
            fix="leave these people out with data.exclude, or split again with all classes in training",
        )


def check_draws(task: TargetTaskConfig, pool: Manifest, draws: Iterable[LabelDraw]) -> None:
    """Refuse a training set without two different targets.

    Raises:
        ConfigError: Names the size and the draw.
    """
    values = dict(zip(pool.table["volume"], pool.table[task.target], strict=True))
    for draw in draws:
        if len({values[volume] for volume in draw.train}) < 2:
            raise ConfigError(
                f"a training set of {draw.n_labelled} holds one value of `{task.target}`, which nothing can be "
                "learnt from",
                where="grid.n_labelled",
                found=f"draw {draw.draw}: {class_name(values[draw.train[0]])}",
                fix="draw more labelled volumes" + (", at least 2" if draw.n_labelled < 2 else ", or another seed"),
            )


def class_name(value: Any) -> str:
    """A label as text: 1, not 1.0."""
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    return str(value)


def classes_of(task: TargetTaskConfig, pool: Manifest) -> tuple[str, ...]:
    """Names of the classes in the order of the network's outputs; empty for regression."""
    if isinstance(task, RegressionConfig):
        return ()
    column = pool.table[task.target].dropna()
    values = sorted(set(column)) if is_number(column) else sorted({str(value) for value in column})
    return tuple(class_name(value) for value in values)


def outputs(
    network: nn.Module,
    store: Any,
    volumes: Sequence[int],
    items: ItemsConfig,
    *,
    statistics: FeatureStatistics | None,
    batch_size: int,
) -> npt.NDArray[np.float64]:
    """What the network says of each volume, without augmentation: the mean over its slices or slabs.

    Args:
        network: Items to (N, D).
        store: Prepared volumes, or rows of features.
        volumes: Which, in this order.
        items: What one item is.
        statistics: How features are standardised.
        batch_size: Slices or slabs in one pass.

    Returns:
        (n, D) float64.
    """
    device = next(network.parameters()).device
    if not isinstance(store, FeatureStore):
        return embed_volumes(
            network,
            store,
            volumes,
            spatial_dims=2 if items.geometry == "slice" else 3,
            depth=items.depth if items.geometry == "slab" else None,
            batch_size=batch_size,
            device=device,
        ).astype(np.float64)
    assert statistics is not None
    rows = torch.from_numpy(statistics.apply(store.rows(volumes)))
    with evaluating(network):
        parts = [network(part.to(device)).double().cpu().numpy() for part in rows.split(ROWS)]
    return np.concatenate(parts)


def prediction_columns(values: npt.NDArray[np.float64], classes: Sequence[str]) -> dict[str, Any]:
    """Columns of a table of predictions: ``predicted``, and for classes the probability of each as ``p_NAME``."""
    if not classes:
        return {"predicted": values[:, 0]}
    best = [classes[place] for place in values.argmax(1)]
    return {"predicted": best, **{f"p_{name}": values[:, place] for place, name in enumerate(classes)}}


def scored_rows(rows: pd.DataFrame, target: str, values: npt.NDArray[np.float64], classes: Sequence[str]) -> Any:
    """One row per volume of a split with what was predicted and the scores whose mean over people is the metric.

    ``abs_error`` is the absolute error. ``balanced`` is 1 or 0 for a right or wrong class times
    (people) / (classes x people of this class): its mean over people is the balanced accuracy of the split, as the mean
    of the recalls of the classes that the split holds. The volumes of one person share this person's weight.

    Args:
        rows: Of the manifest, all of one split.
        target: Column.
        values: (n, 1) or (n, K).
        classes: Names of the K classes; empty for a number.
    """
    kept = ["case", "subject", "group", "split", *(["site"] if rows["site"].notna().any() else [])]
    table = rows[kept].reset_index(drop=True)
    predictions = prediction_columns(values, classes)
    if not classes:
        true = rows[target].to_numpy(dtype=np.float64)
        error = predictions["predicted"] - true
        return table.assign(true=true, **predictions, error=error, abs_error=np.abs(error))
    names = rows[target].map(class_name).reset_index(drop=True)
    mass = 1 / table.groupby("group")["case"].transform("count")
    share = mass.groupby(names).transform("sum") / mass.sum()
    correct = (names == pd.Series(predictions["predicted"])).astype(int)
    return table.assign(true=names, **predictions, correct=correct, balanced=correct / (share * names.nunique()))


def measures(table: pd.DataFrame, classes: Sequence[str]) -> dict[str, float]:
    """Every metric of one fine-tuning on one split, people counted alike: mae, r, r2 or balanced_accuracy, auc.

    Args:
        table: Of ``scored_rows``.
        classes: As there.
    """
    weights = (1 / table.groupby("group")["case"].transform("count")).to_numpy(dtype=np.float64)[None]
    if not classes:
        true, predicted = (table[name].to_numpy(dtype=np.float64) for name in ("true", "predicted"))
        return {name: float(value[0]) for name, value in regression_metrics(true, predicted, weights).items()}
    true, predicted = (table[name].to_numpy(dtype=str) for name in ("true", "predicted"))
    probabilities = table[[f"p_{name}" for name in classes]].to_numpy(dtype=np.float64)
    found = classification_metrics(true, predicted, probabilities, tuple(classes), weights)
    return {"balanced_accuracy": float(found["bacc"][0]), "auc": float(found["auc"][0])}


def validation_score(rows: pd.DataFrame, target: str, values: npt.NDArray[np.float64], classes: Sequence[str]) -> float:
    """For choosing a step, higher is better: minus the MAE, or the mean log-probability of the true class.

    People count alike, and so do the classes that are there.
    """
    mass = 1 / rows.groupby("group")["case"].transform("count").to_numpy(dtype=np.float64)
    if not classes:
        error = np.abs(values[:, 0] - rows[target].to_numpy(dtype=np.float64))
        return -float(np.average(error, weights=mass))
    names = rows[target].map(class_name).tolist()
    picked = values[np.arange(len(values)), [classes.index(name) for name in names]]
    losses = pd.Series(np.log(np.maximum(picked, 1e-12)) * mass).groupby(names).sum()
    return float((losses / pd.Series(mass).groupby(names).sum()).mean())


def reference(task: TargetTaskConfig, pool: Manifest, evaluated: Manifest) -> dict[str, Any]:
    """What a prediction scores that looks at nothing."""
    truth = evaluated.table[task.target]
    if not isinstance(task, RegressionConfig):
        return {"value": round(1 / truth.map(class_name).nunique(), 6), "what": "chance"}
    people = (truth - pool.table[task.target].median()).abs().groupby(evaluated.table["group"]).mean()
    return {"value": round(float(people.mean()), 6), "what": "always the median of the training people"}
