"""Weights on disk: safetensors with checksums, and loading that says what matched."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from medssl.core.errors import ConfigError, WeightsError
from medssl.core.files import atomic_write, write_json
from medssl.core.schema import validate
from medssl.models.cluster_heads import ClusterHeads, build_cluster_heads
from medssl.models.encoders import ENCODERS
from medssl.models.heads import build_head

log = logging.getLogger(__name__)

Part = Literal["encoder", "decoder", "head", "clusters"]
Built = TypeVar("Built", bound=nn.Module)

FORMAT: Final = 1
MAX_BYTES: Final = 8_000_000_000
FOREIGN: Final = (".pt", ".pth", ".ckpt", ".bin")
# Wrappers and containers that other programs put before the names of an encoder's tensors.
PREFIXES: Final = ("", "module.", "encoder.", "network.encoder.", "module.encoder.", "backbone.", "model.")


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a file, by name.

    Attributes:
        matched: Loaded as they are.
        adapted: Loaded after fitting the number of input channels.
        skipped: In the file, but not loaded (no such name, or another shape).
        missing: In the module, but not in the file: they keep their starting values.
    """

    matched: tuple[str, ...]
    adapted: tuple[str, ...]
    skipped: tuple[str, ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{len(self.matched)} tensors matched, {len(self.adapted)} adapted to the number of input channels, "
            f"{len(self.skipped)} of the file skipped, {len(self.missing)} keep their starting values"
        )


def save_weights(
    folder: Path,
    encoder: nn.Module,
    decoder: nn.Module | None = None,
    *,
    head: nn.Module | None = None,
    clusters: nn.Module | None = None,
    info: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``encoder.safetensors``, the same of decoder, head and clusters if there are such, and ``model.json``.

    Each file appears whole or not at all; model.json comes last with the checksums of the others, so that a mixture of
    two writes is noticed on loading. Nothing about people, paths or machines is written beyond what ``info`` holds.

    Args:
        folder: Created if needed.
        encoder: Has ``architecture``.
        decoder: Has ``architecture``; None: an older decoder in the folder is removed.
        head: A `ProjectionHead`; None: an older head in the folder is removed.
        clusters: `ClusterHeads` of the dense map; None: older ones in the folder are removed.
        info: Values for JSON (method, step, versions); no paths and no ids.

    Raises:
        DiskError: No space or no permission.
    """
    sums = {}
    parts = {"encoder": encoder, "decoder": decoder, "head": head, "clusters": clusters}
    for name, module in parts.items():
        if module is not None:
            tensors = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
            data = save_safetensors(tensors)
            atomic_write(folder / f"{name}.safetensors", data)
            sums[f"{name}.safetensors"] = hashlib.sha256(data).hexdigest()
    description = {
        "format": FORMAT,
        **{name: None if module is None else module.architecture for name, module in parts.items()},
        "sha256": sums,
        "info": dict(info or {}),
    }
    write_json(folder / "model.json", description)
    for name, module in parts.items():
        if module is None:
            (folder / f"{name}.safetensors").unlink(missing_ok=True)
    return folder


def read_model(path: Path) -> dict[str, Any]:
    """The description ``model.json`` of a weights folder or run folder: architectures of ``encoder``, ``decoder``,
    ``head`` and ``clusters`` (all but the first may be None), ``sha256`` of the files, ``info``.

    Raises:
        WeightsError: Missing, not JSON, or of a newer format.
    """
    file = _folder(path) / "model.json"
    if not file.is_file():
        raise WeightsError("no model.json beside the weights", where=str(file), fix="give a run folder or its weights/")
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        newer = int(description["format"]) > FORMAT
        if not isinstance(description["sha256"], dict) or not isinstance(description["encoder"], dict):
            raise TypeError("sha256 and encoder must be mappings")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(
            "model.json is damaged", where=str(file), found=str(error), fix="export the weights again"
        ) from error
    if newer:
        raise WeightsError(
            "weights were written by a newer version",
            where=str(file),
            found=f"format {description['format']}, known up to {FORMAT}",
            fix="update medssl",
        )
    for part in ("head", "clusters"):
        description.setdefault(part, None)  # weights from before these were kept
    return description


def encoder_from_weights(path: Path) -> nn.Module:
    """The encoder described and stored in a weights folder or run folder.

    Raises:
        WeightsError: Unreadable, or an encoder that this version does not know.
    """
    path = Path(path)
    architecture = read_model(path)["encoder"]
    config = architecture.get("config", {})
    entry = ENCODERS.get(config.get("name", ""))
    if entry is None:
        raise WeightsError(
            f"weights of an unknown encoder `{config.get('name')}`",
            where=str(path),
            fix=f"known encoders: {', '.join(ENCODERS)}",
        )
    encoder = entry.build(validate(entry.config, config, source=str(path)), architecture["in_channels"])
    load_weights(encoder, path, minimum=1.0)
    return encoder


def head_from_weights(path: Path) -> nn.Module | None:
    """The projection head stored in a weights folder or run folder, or None where its method had none.

    Raises:
        WeightsError: Unreadable, or a head that this version does not know.
    """
    return _part_from_weights(path, "head", build_head)


def clusters_from_weights(path: Path) -> ClusterHeads | None:
    """The heads that give every place a cluster, stored in a weights folder or run folder; None where there are none.

    Raises:
        WeightsError: Unreadable, or heads that this version does not know.
    """
    return _part_from_weights(path, "clusters", build_cluster_heads)


def _part_from_weights(path: Path, part: Part, build: Callable[[Mapping[str, Any]], Built]) -> Built | None:
    path = Path(path)
    architecture = read_model(path)[part]
    if architecture is None:
        return None
    try:
        module = build(architecture)
    except ConfigError as error:
        raise WeightsError(error.message, where=str(path), found=error.found, fix="update medssl") from error
    load_weights(module, path, part=part, minimum=1.0)
    return module


def load_weights(
    module: nn.Module,
    path: Path,
    *,
    part: Part = "encoder",
    minimum: float = 0.5,
    allow_partial: bool = False,
) -> LoadReport:
    """Load the tensors of ``path`` whose names and shapes fit ``module``, and say which did.

    The weight of the first convolution is fitted to another number of input channels: its mean over the file's I
    channels is repeated for each of the module's J, times I / J, so that an image repeated in every channel gives the
    same response as before.

    Args:
        module: Encoder, decoder or head; changed in place, and only when nothing is wrong.
        path: Run folder, weights folder, .safetensors file, or a file of another program (.pt, .pth, .ckpt, .bin),
            which is read without running anything in it.
        part: Which file of a folder.
        minimum: Share that must fit: of an encoder's own tensors, or of the file's for a decoder (one trained with few
            blocks is loaded into one of more).
        allow_partial: Load whatever fits, if it is one tensor, and from another architecture too.

    Raises:
        WeightsError: Missing, damaged or unsafe file, wrong checksum, another architecture, too little that fits.
    """
    path = Path(path)
    file, architecture = _find(path, part)
    tensors = _read(file)
    _check_finite(tensors, file)
    own = module.state_dict()
    chosen, report = _compare(own, tensors)
    _check_fit(module, file, report, architecture, part=part, minimum=0.0 if allow_partial else minimum)
    module.load_state_dict({**own, **chosen})
    log.info("weights %s: %s", file.name, report)
    _warn_strides(module, architecture, file)
    return report


def _folder(path: Path) -> Path:
    path = Path(path)
    if path.is_file():
        return path.parent
    return path / "weights" if (path / "weights").is_dir() else path


def _find(path: Path, part: Part) -> tuple[Path, dict[str, Any] | None]:
    """The file to read, its checksum verified where a model.json gives one, and the architecture it states."""
    folder = _folder(path)
    file = path if path.is_file() else folder / f"{part}.safetensors"
    if not file.is_file():
        raise WeightsError(
            f"no weights of the {part} here", where=str(file), fix="give a run folder, its weights/ or a weights file"
        )
    if file.stat().st_size > MAX_BYTES:
        raise WeightsError("weights file is too large", where=str(file), found=f"{file.stat().st_size} bytes")
    if file.suffix in FOREIGN or not (folder / "model.json").is_file():
        if not path.is_file():
            read_model(path)  # a folder of ours without its description: says so
        return file, None
    description = read_model(path)
    expected = description["sha256"].get(file.name)
    if expected is None:
        return file, None
    with file.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != expected:
        raise WeightsError(
            "weights file is damaged: its checksum is not the one in model.json",
            where=str(file),
            found=f"sha256 {found[:16]}..., expected {str(expected)[:16]}...",
            fix="copy or export the weights again",
        )
    return file, description[file.stem if file.stem in get_args(Part) else part]


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix not in FOREIGN:
            return load_safetensors(file.read_bytes())
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can make its reader fail in any way
        raise WeightsError(
            "not a readable weights file (or one that would run code when opened)",
            where=str(file),
            found=str(error).splitlines()[0][:200] if str(error) else type(error).__name__,
            fix="use .safetensors, or a .pt file that holds a plain state dict of tensors",
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        content = {}
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(
            "no tensors by name in the file", where=str(file), fix="save a state dict: torch.save(model.state_dict())"
        )
    return tensors


def _check_finite(tensors: Mapping[str, Tensor], file: Path) -> None:
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise WeightsError(
            "weights hold values that are not finite",
            where=str(file),
            found=", ".join(bad[:3]),
            fix="use weights from before the training diverged",
        )


def _compare(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], LoadReport]:
    prefix = max(PREFIXES, key=lambda start: sum(start + name in tensors for name in own))
    first = next((name for name, value in own.items() if value.ndim >= 3), None)
    chosen: dict[str, Tensor] = {}
    matched, adapted = [], []
    for name, value in own.items():
        found = tensors.get(prefix + name)
        if found is None:
            continue
        if found.shape == value.shape:
            chosen[name] = found
            matched.append(name)
        elif name == first and found.ndim == value.ndim and _without_inputs(found) == _without_inputs(value):
            scale = found.shape[1] / value.shape[1]
            chosen[name] = (found.mean(1, keepdim=True) * scale).expand_as(value).clone()
            adapted.append(name)
    loaded = {prefix + name for name in chosen}
    return chosen, LoadReport(
        matched=tuple(matched),
        adapted=tuple(adapted),
        skipped=tuple(name for name in tensors if name not in loaded),
        missing=tuple(name for name in own if name not in chosen),
    )


def _without_inputs(weight: Tensor) -> tuple[int, ...]:
    return (weight.shape[0], *weight.shape[2:])


def _check_fit(
    module: nn.Module,
    file: Path,
    report: LoadReport,
    architecture: dict[str, Any] | None,
    *,
    part: Part,
    minimum: float,
) -> None:
    fits = len(report.matched) + len(report.adapted)
    others = report.skipped if part == "decoder" else report.missing
    total = fits + len(others)
    if fits and fits / total >= minimum:
        return
    stated, wanted = _name(architecture), _name(getattr(module, "architecture", None))
    what = "weights of another architecture" if stated != wanted else "too few of the tensors fit"
    names = f"the file holds {stated}, the model is {wanted}; " if stated != wanted else ""
    raise WeightsError(
        what,
        where=str(file),
        found=f"{names}{fits} of {total} tensors fit, at least {minimum:.0%} (and one) must",
        fix="set model.encoder to what the weights were trained with, or pass allow_partial to load what fits",
    )


def _name(architecture: dict[str, Any] | None) -> str:
    """An architecture in words, for messages."""
    if not architecture:
        return "an architecture that is not stated"
    config = architecture.get("config", architecture)
    details = {key: value for key, value in config.items() if key in ("widths", "norm", "blocks")}
    return " ".join(
        [str(config.get("name", config.get("kind"))), *(f"{key} {value}" for key, value in details.items())]
    )


def _warn_strides(module: nn.Module, architecture: dict[str, Any] | None, file: Path) -> None:
    """Strides leave the shapes of an encoder's weights alone, so nothing else would notice that they differ."""
    for key in ("strides", "stem_stride"):
        stated = (architecture or {}).get("config", {}).get(key)
        own = getattr(module, "architecture", {}).get("config", {}).get(key)
        if stated is not None and own is not None and stated != own:
            log.warning("weights %s were trained with %s %s, the model has %s", file.name, key, stated, own)
