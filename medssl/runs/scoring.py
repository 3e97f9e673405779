"""Predict prepared volumes, bring the result back to the file's own grid, and score it there."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch import Tensor, nn

from medssl.config import FinetuneConfig
from medssl.core.files import atomic_write
from medssl.data.manifest import Manifest
from medssl.data.store import CaseGeometry
from medssl.data.volume import read_header, read_label, read_volume, spacing_of
from medssl.evaluation.segmentation import case_metrics, dice
from medssl.inference.config import InferenceConfig
from medssl.inference.native import save_prediction, to_native
from medssl.inference.predict import predict_volume
from medssl.runs.volumes import Cohort, LabelClass

OVERLAY_RANKS = (("best", 1.0), ("median", 0.5), ("worst", 0.0))


@dataclass(frozen=True)
class Scored:
    """Rows of one network's scores: one per case and class."""

    rows: pd.DataFrame


def predict_native(
    network: nn.Module,
    image: npt.NDArray[np.float32],
    geometry: CaseGeometry,
    classes: Sequence[LabelClass],
    *,
    spatial_dims: int,
    slice_axis: int,
    inference: InferenceConfig,
) -> npt.NDArray[np.int16]:
    """Label map (X, Y, Z) in the file's own grid, with the values of the label files."""
    probabilities = probabilities_of(
        network, image, spatial_dims=spatial_dims, slice_axis=slice_axis, inference=inference
    )
    numbers = to_native(probabilities, geometry)
    values = np.zeros(max((one.number for one in classes), default=0) + 1, dtype=np.int16)
    for one in classes:
        values[one.number] = one.value
    return values[numbers]


def probabilities_of(
    network: Any, image: npt.NDArray[np.float32], *, spatial_dims: int, slice_axis: int, inference: InferenceConfig
) -> Tensor:
    """Class probabilities (K, X, Y, Z) of a prepared volume, on the CPU, from a network on any device."""
    return predict_volume(
        network,
        image,
        spatial_dims=spatial_dims,
        slice_axis=slice_axis,
        batch_size=inference.batch_size,
        window=inference.window,
        overlap=inference.overlap,
        device=next(network.parameters()).device,
        multiple=[math.prod(steps) for steps in zip(*network.encoder.strides)],
    )


def score_volumes(
    network: nn.Module,
    cohort: Cohort,
    manifest: Manifest,
    config: FinetuneConfig,
    *,
    predictions: Path | None,
) -> Scored:
    """Predict and score every labelled volume of ``manifest``.

    Args:
        network: Images to logits; on any device.
        cohort: Holds the prepared voxels and the classes.
        manifest: The rows to score.
        config: Geometry of items and inference.
        predictions: Folder for the label maps as NIfTI; None: not written.
    """
    names = {one.value: one.name for one in cohort.classes}
    rows: list[dict[str, Any]] = []
    for volume in (int(v) for v in manifest.table["volume"]):
        path = manifest.label_path(volume)
        if path is None:
            continue
        geometry = cohort.store.geometry(volume)
        predicted = predict_native(
            network,
            cohort.store.image(volume),
            geometry,
            cohort.classes,
            spatial_dims=config.spatial_dims,
            slice_axis=config.items.slice_axis,
            inference=config.inference,
        )
        row = manifest.row(volume)
        if predictions is not None:
            save_prediction(predictions / f"{row['case']}.nii.gz", predicted, geometry)
        label = native_label(manifest, volume)
        place = {"case": row["case"], "subject": row["subject"], "group": row["group"]}
        rows += [{**place, **one} for one in case_rows(predicted, label, names, geometry.native_affine)]
    return Scored(pd.DataFrame(rows))


def case_rows(
    predicted: npt.NDArray[Any], label: npt.NDArray[Any], names: dict[int, str], affine: npt.NDArray[np.float64]
) -> list[dict[str, Any]]:
    """Metrics of one case, one row per class, with the voxels of both sides."""
    values = {name: value for value, name in names.items()}
    rows = []
    for one in case_metrics(predicted, label, names, spacing_of(affine)):
        n_predicted = int(np.count_nonzero(predicted == values[one["class"]]))
        rows.append(
            {
                **{key: one[key] for key in ("class", "dice", "hd95_mm", "missed")},
                "voxels_label": one["voxels"],
                "voxels_prediction": n_predicted,
            }
        )
    return rows


def native_label(manifest: Manifest, volume: int) -> npt.NDArray[np.int16]:
    """The label map of a volume on the grid of its file; stray values become what the manifest says they mean."""
    path = manifest.label_path(volume)
    assert path is not None
    frame = manifest.row(volume)["frame"]
    # The label map of one frame of a 4D image is usually a 3D file.
    several = read_header(path).n_frames > 1
    label = read_label(path, frame=int(frame) if several and not pd.isna(frame) else None)[0]
    for stray, value in manifest.label_aliases.items():
        label[label == stray] = value
    return label


def mean_dice(network: nn.Module, cohort: Cohort, volumes: Sequence[int], config: FinetuneConfig) -> float:
    """Mean Dice over classes and volumes on the prepared grid: cheap, for choosing a step.

    A class that neither label nor prediction holds is left out, as everywhere.
    """
    scores = []
    for volume in volumes:
        probabilities = probabilities_of(
            network,
            cohort.store.image(volume),
            spatial_dims=config.spatial_dims,
            slice_axis=config.items.slice_axis,
            inference=config.inference,
        )
        predicted = probabilities.argmax(0).numpy()
        label = cohort.store.label(volume)
        assert label is not None
        scores += [dice(predicted == one.number, np.asarray(label) == one.number) for one in cohort.classes]
    known = [score for score in scores if score == score]
    return float(np.mean(known)) if known else float("nan")


def save_overlays(config: FinetuneConfig, cohort: Cohort, per_case: pd.DataFrame, folder: Path) -> None:
    """Write the slices that the report shows: best, median and worst case of the last arm's first draw.

    With 2 labelled volumes where the grid has them, else with the fewest.
    """
    if config.save_predictions != "all":
        return
    arm = config.grid.arms[-1].name
    rows = per_case[(per_case["arm"] == arm) & (per_case["draw"] == 1) & (per_case["seed"] == config.grid.seeds[0])]
    n = min(rows["n_labelled"], key=lambda value: (value != 2, value))
    rows = rows[rows["n_labelled"] == n]
    by_case = rows.groupby("case")["dice"].mean().dropna().sort_values(kind="stable")
    if by_case.empty:
        return
    cases = dict(zip(cohort.chosen.table["case"], cohort.chosen.table["volume"]))
    cell = f"{arm}-n{n}-draw1-seed{config.grid.seeds[0]}"
    for rank, share in OVERLAY_RANKS:
        case = str(by_case.index[round(share * (len(by_case) - 1))])
        title = f"{rank}: {case}, Dice {by_case[case]:.3f} ({arm}, {n} labelled, draw 1)"
        arrays = _overlay(cohort, int(cases[case]), folder / "predictions" / cell / f"{case}.nii.gz", config)
        _save_npz(folder / "eval" / "overlays" / f"{rank}.npz", **arrays, title=np.array(title))


def _overlay(cohort: Cohort, volume: int, predicted: Path, config: FinetuneConfig) -> dict[str, npt.NDArray[Any]]:
    """The native slice across the slice axis that holds most of the label."""
    manifest = cohort.chosen
    frame = manifest.row(volume)["frame"]
    image = read_volume(
        manifest.image_paths(volume),
        frame=None if pd.isna(frame) else int(frame),
        channels=manifest.channels(volume),
    )
    label = native_label(manifest, volume)
    prediction, _ = read_label(predicted)
    # The slice axis is one of the prepared (RAS) axes; find the native axis that runs along it.
    directions = np.abs(image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0))
    axis = int(directions[config.items.slice_axis].argmax())
    counts = np.count_nonzero(np.moveaxis(label, axis, 0), axis=(1, 2))
    position = int(counts.argmax()) if counts.any() else label.shape[axis] // 2
    return {
        "image": np.take(image.data[0], position, axis),
        "label": np.take(label, position, axis),
        "prediction": np.take(prediction, position, axis),
    }


def _save_npz(path: Path, **arrays: npt.NDArray[Any]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    atomic_write(path, buffer.getvalue())
