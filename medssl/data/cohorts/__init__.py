"""Known cohorts: each module lists what lies under a folder as a manifest table, and recognises its own layout."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, get_type_hints

from pydantic import TypeAdapter, ValidationError

from medssl.core.errors import ConfigError, DataError, nearest
from medssl.data.cohorts import acdc, bids, folder, mmwhs, msd, nnunet, openbhb, synthetic, table
from medssl.data.cohorts.base import Cohort, Discovery, Recognition, Skipped, existing_folder
from medssl.data.features import SUFFIXES

__all__ = ["COHORTS", "Cohort", "Discovery", "Recognition", "Skipped", "discover_any", "recognise_any"]

_log = logging.getLogger(__name__)

COHORTS: Final[Mapping[str, Cohort]] = MappingProxyType(
    {
        "acdc": Cohort("acdc", acdc.discover, acdc.recognise, "ACDC cine cardiac MRI", "patientNNN/Info.cfg"),
        "msd": Cohort(
            "msd",
            msd.discover,
            msd.recognise,
            "one task of the Medical Segmentation Decathlon",
            "dataset.json with `training` and `modality`",
        ),
        "mmwhs": Cohort(
            "mmwhs",
            mmwhs.discover,
            mmwhs.recognise,
            "MMWHS whole-heart MR and CT",
            "mr_train_NNNN_image.nii.gz (or ct_)",
        ),
        "openbhb": Cohort(
            "openbhb",
            openbhb.discover,
            openbhb.recognise,
            "OpenBHB brain MRI: arrays and measures of regions",
            "participants.tsv beside train/derivatives or val/derivatives",
        ),
        "bids": Cohort(
            "bids", bids.discover, bids.recognise, "a BIDS folder", "sub-* folders with BIDS names or participants.tsv"
        ),
        "nnunet": Cohort(
            "nnunet",
            nnunet.discover,
            nnunet.recognise,
            "one raw dataset of nnU-Net",
            "dataset.json with `channel_names` and `file_ending` beside imagesTr",
        ),
        "table": Cohort(
            "table",
            table.discover,
            table.recognise,
            "a table of measures, one row a visit",
            "a .csv, .parquet or .npy file",
        ),
        "folder": Cohort("folder", folder.discover, folder.recognise, "a plain folder of images", "any NIfTI file"),
        "synthetic": Cohort(
            "synthetic", synthetic.discover, synthetic.recognise, "the embedded synthetic cohort", "synthetic.json"
        ),
    }
)


def discover_any(root: str | Path, kind: str = "auto", **options: Any) -> Discovery:
    """List the volumes under a folder in the named layout, or in the one that is recognised.

    Args:
        root: The folder.
        kind: A name in `COHORTS`, or "auto".
        options: Options of that layout's `discover`; text, as a command line gives it, is converted.

    Returns:
        The discovery, with `cohort` and `why` filled in.

    Raises:
        ConfigError: If `kind` or an option is unknown, or an option has a value that it cannot have.
        DataError: If nothing or more than one layout is recognised, or the layout is damaged.
    """
    if kind == "auto" and Path(root).is_file() and Path(root).suffix.lower() in SUFFIXES:
        kind = "table"
    if kind == "auto":
        cohort, recognition = recognise_any(root)
        why = recognition.why
    elif kind in COHORTS:
        cohort, why = COHORTS[kind], "named by the caller"
    else:
        raise ConfigError(f"unknown kind of cohort `{kind}`", fix=nearest(kind, [*COHORTS, "auto"]))
    found = replace(cohort.discover(root, **_typed(cohort, options)), cohort=cohort.name, why=why)
    _log.info(
        "%s read as %s (%s): %d volumes, %d skipped", root, cohort.name, why, len(found.table), len(found.skipped)
    )
    return found


def recognise_any(root: str | Path) -> tuple[Cohort, Recognition]:
    """The one layout that claims a folder, and why.

    Raises:
        DataError: If no layout or more than one does, with what each looked for.
    """
    path = existing_folder(root)
    claims = {name: cohort.recognise(path) for name, cohort in COHORTS.items()}
    best = max(claim.score for claim in claims.values())
    winners = [name for name, claim in claims.items() if claim and (claim.score == best or claim.score >= 0.5)]
    if len(winners) == 1:
        return COHORTS[winners[0]], claims[winners[0]]
    if winners:
        raise DataError(
            "the folder fits more than one layout",
            where=str(path),
            found="; ".join(f"{name}: {claims[name].why}" for name in winners),
            fix=f"name the layout: --kind {' or --kind '.join(winners)}",
        )
    looked = "\n".join(f"    {name}: {cohort.looks_for}" for name, cohort in COHORTS.items())
    raise DataError(
        f"no known layout recognised; looked for\n{looked}",
        where=str(path),
        fix="check the path, or name the layout with --kind",
    )


def _typed(cohort: Cohort, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options converted to the types of the layout's `discover`."""
    known = [name for name, p in inspect.signature(cohort.discover).parameters.items() if p.kind is p.KEYWORD_ONLY]
    hints = get_type_hints(cohort.discover)
    converted = {}
    for name, value in options.items():
        if name not in known:
            hint = nearest(name, known) if known else "it has no options"
            raise ConfigError(f"{cohort.name}: unknown option `{name}`", fix=hint)
        try:
            converted[name] = TypeAdapter(hints[name]).validate_python(value)
        except ValidationError as error:
            message = "; ".join(item["msg"] for item in error.errors(include_url=False))
            raise ConfigError(f"{cohort.name}: option `{name}`: {message}", found=repr(value)) from error
    return converted
