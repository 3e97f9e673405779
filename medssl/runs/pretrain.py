"""Pretrain an encoder, or decoder blocks on top of one, on unlabelled volumes."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medssl.config import PretrainConfig, dump_config
from medssl.core import distributed
from medssl.core.errors import ConfigError, DataError
from medssl.core.files import write_json
from medssl.core.types import ItemTable, Method, ModelParts
from medssl.data.feature_store import FeatureReader
from medssl.data.manifest import Manifest
from medssl.data.splits import TEST_SPLITS, refuse_leak
from medssl.methods import METHODS, Debiased, with_debias
from medssl.methods.iic_segmentation import IICSegmentation
from medssl.methods.supervised import SupervisedConfig, n_classes_of
from medssl.models import (
    LinearHead,
    ProjectionHead,
    build_decoder,
    build_encoder,
    load_weights,
    read_model,
    save_weights,
)
from medssl.reporting import build_report
from medssl.runs.clusters import ClusterLog, final_clusters, save_clusters, summary_rows
from medssl.runs.folder import open_run, record_run, run_folder, tracked
from medssl.runs.grid import fingerprint
from medssl.runs.labels import check_labels, prior_fingerprint, prior_seen, training_items
from medssl.runs.view_sizes import view_shape
from medssl.runs.volumes import (
    FINGERPRINT_DIGITS,
    STATISTICS,
    Cohort,
    in_splits,
    load_manifest,
    open_run_cohort,
    pretraining_manifests,
    row_hashes,
    weights_statistics,
    with_absolute_paths,
)
from medssl.samplers import SAMPLERS
from medssl.training import BatchSource, TrainResult, build_fabric, train
from medssl.training.device import resolve_accelerator, resolve_precision

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pretrained:
    """What a pretraining left behind; ``summary`` is empty on every process but the first, which speaks for all."""

    folder: Path
    weights: Path
    summary: dict[str, Any]
    report: Path | None

    def text(self) -> str:
        """For people."""
        summary = self.summary
        if not summary:
            return ""
        lines = [
            f"{summary['method']}: {summary['steps']} steps in {summary['seconds']:.0f} s, "
            f"{100 * summary['data_wait_share']:.1f} % of it waiting for data",
            *(f"WARNING: {line}" for line in (*summary["collapse"], *summary["label_notes"])),
            f"weights: {self.weights}",
            f"report:  {self.report}",
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {**self.summary, "folder": str(self.folder), "weights": str(self.weights), "report": str(self.report)}


def pretrain(config: PretrainConfig, *, resume: bool = False, allow_changed: bool = False) -> Pretrained:
    """Run one pretraining.

    Args:
        config: The validated configuration.
        resume: Go on in an existing run folder.
        allow_changed: Resume although the configuration or manifest changed.

    Raises:
        ConfigError, DataError: Before any training starts.
        Interrupted: Asked to stop; resumable.
    """
    resolve_precision(config.training, resolve_accelerator(config.training))
    for note in config.notes:
        log.warning("%s", note)
    manifest, _ = load_manifest(config.data)
    leaks = check_leaks(config, manifest)
    # Processes that Fabric starts later run this function too; the first one has made everything by then.
    leader = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0")))) == 0
    folder = run_folder(config.runs, config.name)
    chosen, text = in_splits(manifest, config.data.splits), dump_config(config)
    notes = check_labels(config, chosen, tested_rows(manifest))

    def on_event(name: str, values: Mapping[str, Any]) -> None:
        if name == "started" and resume:
            record_run(folder, config_text=text, manifest=chosen)
        if cluster_log is not None:
            cluster_log.on_event(name, values)

    if leader:
        open_run(config.runs, config.name, kind="pretrain", config_text=text, manifest=chosen, resume=resume)
    with tracked(folder, "pretrain") if leader else contextlib.nullcontext({}) as info:
        cohort = open_run_cohort(config, statistics=weights_statistics(config.weights))
        opened = open_training(config, cohort)
        method, reader = opened.method, opened.source.reader
        cluster_log = ClusterLog.of_run(config, method, reader.table, folder)
        fabric = build_fabric(config.training)
        distributed.barrier()
        trained = train(
            method,
            opened.source,
            config.training,
            optimizer=config.optimizer,
            schedule=config.schedule,
            seed=config.seed,
            run_dir=folder,
            fabric=fabric,
            resume=resume,
            allow_changed=allow_changed,
            fingerprint={
                "config": config.model_dump(mode="json", exclude={"name", "runs", "status"}),
                "manifest": cohort.chosen.hash(),
                "files": fingerprint([reader.store.key(volume) for volume in cohort.store.volumes]),
                "prior": prior_fingerprint(config),
            },
            on_event=on_event,
        )
        if distributed.rank() != 0:
            return Pretrained(folder, folder / "weights", {}, None)
        if isinstance(reader, FeatureReader):
            reader.statistics.save(folder / "weights" / STATISTICS)
        done = finish(config, cohort, opened, trained, folder, leaks, notes, cluster_log)
        info["collapse"] = trained.collapse
    return replace(done, report=build_report(folder))  # after the status says done


@dataclass(frozen=True)
class Opened:
    """What one pretraining trains: a method on batches; ``begun_from``: checksum of the weights it begins from."""

    method: Method
    source: BatchSource
    begun_from: str | None


def open_training(config: PretrainConfig, cohort: Cohort, *, untrained: bool = False) -> Opened:
    """The method of a pretraining and the batches that it learns from.

    Args:
        config: The run.
        cohort: Its volumes or rows of features, opened.
        untrained: Leave out the weights that it begins from: to check everything else while they are not there yet.

    Raises:
        ConfigError, DataError: Items, sampler, batch or method do not fit each other.
    """
    statistics = weights_statistics(config.weights)  # what the weights were trained on, if that were features
    with_maps = "label_map" in config.needs.labels
    table, reader = training_items(config, cohort, cohort.chosen, statistics=statistics, with_labels=with_maps)
    settings = config.sampler.model_dump(exclude={"name"})
    sampler = SAMPLERS[config.sampler.name](table, seed=config.seed, **settings)
    check_batch(config, sampler.batch_size)
    method, begun_from = build_method(config, reader.image_shape, table, untrained=untrained)
    source = BatchSource(sampler, reader, config.views, seed=config.seed, workers=config.training.workers)
    return Opened(method, source, begun_from)


def check_leaks(config: PretrainConfig, manifest: Manifest) -> list[str]:
    """Refuse pretraining on people of a test split, in this run or in what it begins from.

    Returns what ``transductive`` let pass.
    """
    test = tested_rows(manifest)
    if len(test) == 0:
        return []
    chosen = in_splits(manifest, config.data.splits)
    hashes = row_hashes(config, manifest, config.weights)
    sets = {"pretraining": chosen, "test": test}
    found = refuse_leak(sets, transductive=config.data.transductive, voxels=hashes)
    if config.weights is not None:
        _refuse_seen(config, test, hashes)
    test = with_absolute_paths(test)
    for earlier in [] if config.weights is None else pretraining_manifests(config.weights):
        sets = {"the pretraining that this one begins from": earlier, "test": test}
        found += refuse_leak(sets, transductive=config.data.transductive)
    return [str(leak) for leak in found]


def tested_rows(manifest: Manifest) -> Manifest:
    """The rows of the test splits."""
    return manifest.select(manifest.table["split"].isin(TEST_SPLITS).to_numpy(dtype=bool))


def _refuse_seen(config: PretrainConfig, test: Manifest, hashes: Mapping[int, str]) -> None:
    """Refuse weights that saw rows of the test split, whatever files and names those had then."""
    if not hashes or config.weights is None or config.data.transductive:
        return
    seen = set(read_model(config.weights)["info"].get("pretrained_on", ()))
    known = [
        str(case)
        for volume, case in zip(test.table["volume"], test.table["case"], strict=True)
        if hashes[int(volume)][:FINGERPRINT_DIGITS] in seen
    ]
    if known:
        raise DataError(
            f"{len(known)} rows of the test split were pretrained on by the weights that this run begins from",
            where=str(config.weights),
            found=", ".join(known[:10]) + (" ..." if len(known) > 10 else ""),
            fix="begin from other weights, split otherwise, or set data.transductive: true",
        )


def check_batch(config: PretrainConfig, batch_size: int) -> None:
    """Refuse a batch of a size that the method cannot take, or that the processes cannot share.

    Raises:
        ConfigError: Says which.
    """
    needs = config.needs
    limits = {
        f"at least {needs.min_batch} items": batch_size < needs.min_batch,
        f"at most {needs.max_batch} items": needs.max_batch is not None and batch_size > needs.max_batch,
        f"a multiple of {needs.batch_multiple} items": batch_size % needs.batch_multiple != 0,
    }
    for limit, broken in limits.items():
        if broken:
            raise ConfigError(
                f"method `{config.method.name}` needs a batch of {limit} with these settings",
                where="sampler",
                found=str(batch_size),
                fix="change the batch of the sampler (batch_size; n_volumes of the sampler partition)",
            )
    processes = config.training.devices * config.training.nodes
    if batch_size % processes:
        raise ConfigError(f"a batch of {batch_size} items cannot be shared by {processes} processes", where="sampler")


def build_method(
    config: PretrainConfig, image_shape: tuple[int, ...], table: ItemTable, *, untrained: bool = False
) -> tuple[Method, str | None]:
    """The method with its networks and regulariser, and the checksum of the weights it begins from.

    Args:
        config: The run.
        image_shape: (C, *spatial) of an item, or (F,).
        table: Everything that is trained on: the method looks at its labels once (`Method.fit_labels`).
        untrained: Build it with random weights although it begins from others.

    Raises:
        ConfigError: A decoder is trained on a frozen encoder without weights; labels that the method cannot learn from.
        WeightsError: The weights do not fit.
    """
    encoder = build_encoder(config.model.encoder, image_shape, seed=config.seed)
    image_shape = view_shape(config, encoder, image_shape)
    decoder = None
    if config.needs.decoder:
        decoder = build_decoder(encoder, blocks=config.model.decoder_blocks, seed=config.seed)
    begun_from = None
    if config.weights is not None and not untrained:
        load_weights(encoder, config.weights)
        begun_from = read_model(config.weights)["sha256"]["encoder.safetensors"]
    elif not untrained and "encoder" not in config.needs.trains:
        raise ConfigError(
            f"method `{config.method.name}` trains a decoder on a frozen encoder, which is random without weights",
            where="weights",
            fix="name an encoder's pretraining (weights: runs/NAME), or set method.freeze_encoder: false",
        )
    settings = config.method
    if isinstance(settings, SupervisedConfig) and settings.loss == "cross_entropy" and settings.n_classes is None:
        settings = settings.model_copy(update={"n_classes": n_classes_of(table, settings.target)})
    parts = ModelParts(encoder, decoder, image_shape)
    method = with_debias(METHODS[settings.name].build(settings, parts, seed=config.seed), config.debias)
    method.fit_labels(table)
    return method, begun_from


def finish(
    config: PretrainConfig,
    cohort: Cohort,
    opened: Opened,
    trained: TrainResult,
    folder: Path,
    leaks: list[str],
    notes: list[str],
    cluster_log: ClusterLog | None,
) -> Pretrained:
    """Export weights and clusters, and write the summary."""
    method, begun_from = opened.method, opened.begun_from
    decoder = method.decoder if "decoder" in config.needs.trains else None
    head = method.head if isinstance(method.head, (ProjectionHead, LinearHead)) else None
    clusters = method.cluster_heads if isinstance(method, IICSegmentation) else None
    fingerprints = {cohort.store.voxels(volume)[:FINGERPRINT_DIGITS] for volume in cohort.store.volumes}
    fingerprints |= prior_seen(config)
    if config.weights is not None:
        fingerprints |= set(read_model(config.weights)["info"].get("pretrained_on", ()))
    weights = save_weights(
        folder / "weights",
        method.encoder,
        decoder,
        head=head,
        clusters=clusters,
        info={
            "method": config.method.model_dump(mode="json"),
            "debias": None if config.debias is None else config.debias.model_dump(mode="json"),
            "steps": trained.steps,
            "begun_from": begun_from,
            "transductive": config.data.transductive,
            "pretrained_on": sorted(fingerprints),
        },
    )
    compared = []
    labels = None if cluster_log is None else final_clusters(config, method, opened.source)
    if cluster_log is not None and labels is not None:
        save_clusters(labels, opened.source.reader.table, cohort.chosen, config, weights)
        compared = cluster_log.add(trained.steps, labels)
    summary = {
        "method": config.method.name,
        "strategy": getattr(config.method, "strategy", None),
        "steps": trained.steps,
        "seconds": round(trained.seconds, 2),
        "data_wait_share": round(trained.data_wait_share, 5),
        "collapse": list(trained.collapse),
        "recovered": list(trained.recovered),
        "clusters": summary_rows(compared),
        "label_notes": [*notes, *empty_batches(method)],
        "debias": None if config.debias is None else config.debias.model_dump(mode="json"),
        "skipped_checkpoints": list(trained.skipped),
        "transductive": config.data.transductive,
        "leaks_let_pass": leaks,
        "n_volumes": len(cohort.store.volumes),
        "n_groups": int(cohort.chosen.table["group"].nunique()),
        "left_out": list(cohort.left_out),
        "weights": {
            "encoder": len(method.encoder.state_dict()),
            **{
                name: len(part.state_dict())
                for name, part in (("decoder", decoder), ("head", head), ("clusters", clusters))
                if part
            },
        },
        "last": {name: float(value) for name, value in trained.last.items()},
    }
    write_json(folder / "eval" / "pretrain.json", summary)
    return Pretrained(folder, weights, summary, None)


def empty_batches(method: Method) -> list[str]:
    """How often a regulariser had nothing to compare."""
    n = int(method.batches_without_pairs) if isinstance(method, Debiased) else 0
    if n == 0:
        return []
    return [
        f"debias: {n} batches had no aligned or no conflicting pairs, so that it did nothing there; "
        "the samplers site_balanced and age_site_balanced give every batch both kinds"
    ]
