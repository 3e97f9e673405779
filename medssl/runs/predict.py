"""Predict new volumes with a fine-tuned network: label maps, or one number or class for each."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from medssl.config import FinetuneConfig
from medssl.core.errors import ConfigError, DataError, MedsslError, WeightsError
from medssl.core.files import atomic_write, write_json
from medssl.core.schema import validate
from medssl.core.types import ModelParts
from medssl.data.cache import prepare
from medssl.data.feature_store import open_features
from medssl.data.features import FeaturesConfig, FeatureStatistics
from medssl.data.items import ItemsConfig
from medssl.data.manifest import Manifest, ManifestMeta, read_manifest
from medssl.data.masks import mask_for
from medssl.data.store import CaseGeometry
from medssl.data.volume import SUFFIXES, Volume, read_header, read_volume, stem_of, write_nifti
from medssl.inference.config import InferenceConfig
from medssl.methods import TASKS
from medssl.methods.targets import TargetTask, TargetTaskConfig
from medssl.models import ENCODERS, SegmentationNet, build_decoder
from medssl.reporting import write_csv
from medssl.runs.scoring import predict_native
from medssl.runs.targets import outputs, prediction_columns
from medssl.runs.volumes import STATISTICS, Cohort, LabelClass
from medssl.training import TrainingConfig
from medssl.training.device import resolve_accelerator
from medssl.transforms.preprocess import PrepareConfig, preprocess

log = logging.getLogger(__name__)

PREDICTIONS: Final = "predictions.csv"
"""What a regression or classification writes."""


@dataclass(frozen=True)
class Segmenter:
    """A fine-tuned network and everything that its input and output need."""

    network: nn.Module
    prepare: PrepareConfig
    inference: InferenceConfig
    classes: tuple[LabelClass, ...]
    spatial_dims: int
    slice_axis: int
    channels: int

    def __call__(self, image: np.ndarray, affine: np.ndarray, *, where: str) -> np.ndarray:
        """(C, X, Y, Z) in any orientation to a label map (X, Y, Z) on the same grid.

        Raises:
            DataError: Another number of channels than it was trained with, or a volume that cannot be prepared.
        """
        if image.shape[0] != self.channels:
            raise DataError(
                f"the network takes {self.channels} channels", where=where, found=f"{image.shape[0]} channels"
            )
        mask = mask_for(Volume(image, affine, where), self.prepare, where=where)
        prepared = preprocess(image, affine, self.prepare, mask=mask, where=where)
        geometry = CaseGeometry(affine, image.shape[1:], prepared.affine, prepared.image.shape[1:], self.slice_axis)
        return predict_native(
            self.network,
            prepared.image,
            geometry,
            self.classes,
            spatial_dims=self.spatial_dims,
            slice_axis=self.slice_axis,
            inference=self.inference,
        )


@dataclass
class Predicted:
    """Files that were written (label maps, or one table of ``n_rows`` volumes), and inputs that failed."""

    written: list[Path] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    n_rows: int = 0

    def text(self) -> str:
        """For people."""
        tables = [path for path in self.written if path.suffix == ".csv"]
        lines = [f"{len(self.written)} label maps written"]
        if tables:
            lines = [f"{self.n_rows} volumes predicted -> {tables[0]}"]
        lines += [f"FAILED {name}: {why}" for name, why in self.failed.items()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {"written": [str(path) for path in self.written], "failed": self.failed, "n_rows": self.n_rows}


def save_network(folder: Path, network: SegmentationNet, config: FinetuneConfig, cohort: Cohort) -> None:
    """Write ``network.safetensors`` and ``network.json``: the weights, how to prepare a volume, what classes mean."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    data = save_tensors(tensors)
    atomic_write(folder / "network.safetensors", data)
    write_json(
        folder / "network.json",
        {
            "format": 1,
            "encoder": network.encoder.architecture,
            "decoder": network.decoder.architecture,
            "n_classes": network.n_classes,
            "classes": [[one.number, one.value, one.name] for one in cohort.classes],
            "prepare": _to_be_found_again(config.data.prepare).model_dump(mode="json"),
            "inference": config.inference.model_dump(mode="json"),
            "spatial_dims": config.spatial_dims,
            "slice_axis": config.items.slice_axis,
            "sha256": hashlib.sha256(data).hexdigest(),
        },
    )


def _to_be_found_again(settings: PrepareConfig) -> PrepareConfig:
    """The same settings with the whole path of a mask: predictions may be made in another folder."""
    return settings if settings.mask is None else settings.model_copy(update={"mask": settings.mask.resolve()})


@dataclass(frozen=True)
class TargetNetwork:
    """A network that predicts one label of a person, and everything that its input and output need."""

    task: TargetTask
    config: TargetTaskConfig
    prepare: PrepareConfig
    inference: InferenceConfig
    items: ItemsConfig
    classes: tuple[str, ...]
    statistics: FeatureStatistics | None
    channels: int


def save_target_network(
    folder: Path,
    task: TargetTask,
    config: FinetuneConfig,
    settings: TargetTaskConfig,
    classes: tuple[str, ...],
    statistics: FeatureStatistics | None,
) -> None:
    """Write ``network.safetensors`` and ``network.json`` of a regression or classification.

    Args:
        folder: Where; rows of features also leave ``features.json``.
        task: The trained network.
        config: The run.
        settings: The task's section as it was built.
        classes: Names of the outputs; empty for a number.
        statistics: How features were standardised.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in task.state_dict().items()}
    data = save_tensors(tensors)
    atomic_write(folder / "network.safetensors", data)
    if statistics is not None:
        statistics.save(folder / STATISTICS)
    encoder: Any = task.encoder
    write_json(
        folder / "network.json",
        {
            "format": 1,
            "task": settings.model_dump(mode="json"),
            "encoder": encoder.architecture,
            "classes": list(classes),
            "prepare": _to_be_found_again(config.data.prepare).model_dump(mode="json"),
            "inference": config.inference.model_dump(mode="json"),
            "items": config.items.model_dump(mode="json"),
            "sha256": hashlib.sha256(data).hexdigest(),
        },
    )


def load_target_network(path: Path, device: torch.device | str = "cpu") -> TargetNetwork:
    """Load what ``save_target_network`` wrote; arguments and errors as for ``load_segmenter``."""
    folder, about = _read_about(path)
    try:
        data = _read_tensors(folder, about)
        entry = ENCODERS[about["encoder"]["config"]["name"]]
        source = str(folder / "network.json")
        channels = int(about["encoder"]["in_channels"])
        items = validate(ItemsConfig, about["items"], source=source)
        encoder = entry.build(validate(entry.config, about["encoder"]["config"], source=source), channels)
        named = TASKS[about["task"]["name"]]
        config: Any = validate(named.config, about["task"], source=source)
        dims = {"features": 0, "slice": 2}.get(items.geometry, 3)
        task: Any = named.build(config, ModelParts(encoder, None, (channels, *(1,) * dims)))
        task.load_state_dict(load_tensors(data))
        return TargetNetwork(
            task.to(device).eval(),
            config,
            validate(PrepareConfig, about["prepare"], source=source),
            validate(InferenceConfig, about["inference"], source=source),
            items,
            tuple(about["classes"]),
            FeatureStatistics.load(folder / STATISTICS) if items.geometry == "features" else None,
            channels,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ConfigError) as error:
        raise _cannot_load(folder, error) from error


def load_segmenter(path: Path, device: torch.device | str = "cpu") -> Segmenter:
    """Load what ``save_network`` wrote.

    Args:
        path: Folder of a cell (``runs/<name>/cells/<cell>``), or its ``weights`` folder.
        device: Where the network runs.

    Raises:
        WeightsError: Not such a folder, or damaged.
    """
    folder, about = _read_about(path)
    file = folder / "network.json"
    try:
        data = _read_tensors(folder, about)
        entry = ENCODERS[about["encoder"]["config"]["name"]]
        config = validate(entry.config, about["encoder"]["config"], source=str(file))
        encoder = entry.build(config, about["encoder"]["in_channels"])
        decoder = build_decoder(encoder, blocks=about["decoder"]["blocks"], norm=about["decoder"]["norm"])
        network = SegmentationNet(encoder, decoder, about["n_classes"])
        network.load_state_dict(load_tensors(data))
        return Segmenter(
            network.to(device).eval(),
            validate(PrepareConfig, about["prepare"], source=str(file)),
            validate(InferenceConfig, about["inference"], source=str(file)),
            tuple(LabelClass(*one) for one in about["classes"]),
            int(about["spatial_dims"]),
            int(about["slice_axis"]),
            int(about["encoder"]["in_channels"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ConfigError) as error:
        raise _cannot_load(folder, error) from error


def _read_about(path: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a network and its description."""
    folder = path / "weights" if (path / "weights" / "network.json").is_file() else path
    file = folder / "network.json"
    if not file.is_file():
        cells = sorted(cell.name for cell in (path / "cells").glob("*") if cell.is_dir())[:5]
        hint = f"for instance {path / 'cells' / cells[0]}" if cells else "such as runs/NAME/cells/CELL"
        raise WeightsError("no fine-tuned network here", where=str(path), fix=f"name the folder of a cell, {hint}")
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(about, dict):
            raise ValueError("network.json holds no object")
    except (OSError, ValueError) as error:
        raise _cannot_load(folder, error) from error
    return folder, about


def _read_tensors(folder: Path, about: dict[str, Any]) -> bytes:
    data = (folder / "network.safetensors").read_bytes()
    if hashlib.sha256(data).hexdigest() != about["sha256"]:
        raise ValueError("network.safetensors does not have the checksum that network.json states")
    return data


def _cannot_load(folder: Path, error: Exception) -> WeightsError:
    return WeightsError(
        "the fine-tuned network cannot be loaded",
        where=str(folder),
        found=str(error).splitlines()[0] if str(error) else type(error).__name__,
        fix="fine-tune again, or copy the whole folder of the cell",
    )


def predict(weights: Path, inputs: Path, out: Path, *, accelerator: str = "auto") -> Predicted:
    """Predict volumes: a label map for each in the geometry of its input, or one table with a number or class for each.

    Args:
        weights: Folder of a cell.
        inputs: A manifest, one volume, or a folder of volumes.
        out: Folder for ``<case>.nii.gz``, or for ``predictions.csv`` (a row per volume: ``subject``, ``case``,
            ``predicted``, and for classes the probability of each); no file of the input is ever overwritten.
        accelerator: auto, cpu or gpu.

    Raises:
        WeightsError, DataError, ConfigError: Before anything is predicted; DataError also when nothing could be.
    """
    device = resolve_accelerator(
        validate(TrainingConfig, {"steps": 1, "accelerator": accelerator}, source="--accelerator")
    )
    if is_target_network(weights):
        return _predict_targets(load_target_network(weights, device), inputs, out)
    segmenter = load_segmenter(weights, device)
    manifest = input_manifest(inputs, channels=segmenter.channels)
    targets = _targets(manifest, out)
    result = Predicted()
    for volume, target in targets.items():
        row = manifest.row(volume)
        frame = None if pd.isna(row["frame"]) else int(row["frame"])
        try:
            image = read_volume(manifest.image_paths(volume), frame=frame, channels=manifest.channels(volume))
            label = segmenter(image.data, image.affine, where=str(row["case"]))
        except MedsslError as error:
            result.failed[str(row["case"])] = str(error)
            continue
        write_nifti(target, label, image.affine, dtype=np.int16)
        result.written.append(target)
        log.info("%s", target)
    if not result.written:
        raise DataError("no volume could be segmented", found="; ".join(result.failed.values())[:500])
    return result


def is_target_network(path: Path) -> bool:
    """Whether the network in a folder predicts one label of a person; False also where there is none."""
    file = next((one for one in (path / "weights" / "network.json", path / "network.json") if one.is_file()), None)
    return file is not None and "task" in _read_about(path)[1]


def _predict_targets(network: TargetNetwork, inputs: Path, out: Path) -> Predicted:
    """Write ``predictions.csv``; a volume that cannot be prepared is left out and named."""
    manifest = input_manifest(inputs, channels=network.channels)
    target = out / PREDICTIONS
    read = {manifest.path.resolve()}
    read |= {path.resolve() for v in manifest.table["volume"] for path in manifest.image_paths(int(v))}
    if target.resolve() in read:
        raise ConfigError(
            "the output would overwrite the input; nothing was written",
            where=str(target),
            fix="choose another --out",
        )
    result = Predicted()
    values, done = (
        _features_predicted(network, manifest) if network.statistics else _volumes_predicted(network, manifest, result)
    )
    if not done:
        raise DataError("no volume could be predicted", found="; ".join(result.failed.values())[:500])
    rows = manifest.table.set_index("volume").loc[done, ["subject", "case"]].reset_index(drop=True)
    write_csv(rows.assign(**prediction_columns(values, network.classes)), target)
    result.written.append(target)
    result.n_rows = len(rows)
    return result


def _features_predicted(network: TargetNetwork, manifest: Manifest) -> tuple[np.ndarray, list[int]]:
    """Predictions of all rows; a table that does not fit is refused as a whole.

    Raises:
        DataError: Other features than the network was trained on, or missing ones.
    """
    assert network.statistics is not None
    settings = FeaturesConfig(
        columns=list(network.statistics.names), impute="mean" if network.statistics.impute else None
    )
    store = open_features(manifest, settings, names=network.statistics.names)
    volumes = [int(volume) for volume in manifest.table["volume"]]
    return _outputs(network, store, volumes), volumes


def _volumes_predicted(network: TargetNetwork, manifest: Manifest, result: Predicted) -> tuple[np.ndarray, list[int]]:
    plain = replace(manifest, table=manifest.table.assign(label=None))  # a label map is neither needed nor read
    done, values = [], []
    for volume in (int(one) for one in manifest.table["volume"]):
        case = str(manifest.row(volume)["case"])
        one = plain.select((plain.table["volume"] == volume).to_numpy(dtype=bool))
        try:
            with TemporaryDirectory(prefix="medssl-predict-") as cache:
                store = prepare(one, network.prepare, Path(cache), slice_axis=network.items.slice_axis)
                if store.channels != network.channels:
                    raise DataError(
                        f"the network takes {network.channels} channels", where=case, found=f"{store.channels} channels"
                    )
                values.append(_outputs(network, store, [volume]))
        except MedsslError as error:
            result.failed[case] = str(error)
            continue
        done.append(volume)
        log.info("%s", case)
    return np.concatenate(values) if values else np.empty((0, 1)), done


def _outputs(network: TargetNetwork, store: Any, volumes: list[int]) -> np.ndarray:
    return outputs(
        network.task, store, volumes, network.items,
        statistics=network.statistics, batch_size=network.inference.batch_size,
    )  # fmt: skip


def _targets(manifest: Manifest, out: Path) -> dict[int, Path]:
    """The file to write for each volume.

    Raises:
        ConfigError: One of them is an image or a label map of the input: overwritten labels would score perfectly.
    """
    volumes = [int(volume) for volume in manifest.table["volume"]]
    inputs = {path.resolve() for volume in volumes for path in manifest.image_paths(volume)}
    inputs |= {path.resolve() for volume in volumes if (path := manifest.label_path(volume)) is not None}
    targets = {volume: out / f"{manifest.row(volume)['case']}.nii.gz" for volume in volumes}
    for target in targets.values():
        if target.resolve() in inputs:
            raise ConfigError(
                "the output would overwrite an image or label map of the input; nothing was written",
                where=str(target),
                fix="choose another --out",
            )
    return targets


def input_manifest(inputs: Path, *, channels: int = 1) -> Manifest:
    """A manifest as it is, or one made for a volume or a folder of volumes.

    Args:
        inputs: A manifest, one volume, or a folder of volumes.
        channels: Of the network; above 1, the fourth axis of a volume without a manifest holds that many.

    Raises:
        DataError: Nothing to segment there, or two volumes of one name (a.nii and a.nii.gz).
    """
    if inputs.suffix == ".csv":
        return read_manifest(inputs)
    if inputs.is_dir():
        files = sorted(path for path in inputs.iterdir() if path.name.lower().endswith(SUFFIXES))
    else:
        files = [inputs] if inputs.is_file() else []
    if not files:
        raise DataError(
            "nothing to segment", where=str(inputs), fix=f"name a manifest.csv, a volume, or a folder of {SUFFIXES}"
        )
    table = pd.DataFrame({"subject": [stem_of(path) for path in files], "image": [path.name for path in files]})
    repeated = table["subject"][table["subject"].str.lower().duplicated(keep=False)]
    if len(repeated):
        raise DataError(
            "two volumes would be written to one file",
            where=str(inputs),
            found=", ".join(table["image"][repeated.index]),
            fix="take one of them out of the folder, or name the volumes in a manifest.csv",
        )
    names = ";".join(f"channel {number}" for number in range(1, channels + 1)) if channels > 1 else None
    modality = [names if channels > 1 and _is_4d(path) else None for path in files]
    table = table.assign(volume=range(len(files)), case=table["subject"], frame=None, modality=modality, label=None)
    return Manifest(table, ManifestMeta(), files[0].parent / "manifest.csv")


def _is_4d(path: Path) -> bool:
    try:
        return read_header(path).n_frames > 1
    except DataError:
        return False  # reported with its cause when it is segmented
