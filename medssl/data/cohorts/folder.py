"""A plain folder: every NIfTI file, or the files that a pattern such as `{subject}/{session}_T1.nii.gz` matches."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Final

from medssl.core.errors import ConfigError
from medssl.data.cohorts.base import (
    Discovery,
    Recognition,
    Skipped,
    build_table,
    existing_folder,
    is_nifti,
    junk_reason,
    leftovers,
    list_files,
    natural_key,
    stem,
)
from medssl.data.manifest import ManifestMeta

_FIELD: Final = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_LABEL_FOLDER: Final = re.compile(r"^(labels?|masks?|seg(mentation)?s?|gt|annotations?)([A-Z_-].*)?$", re.IGNORECASE)
_RESERVED: Final = {"image", "label", "volume", "case"}


def recognise(root: Path) -> Recognition:
    """Any folder with a NIfTI file; only taken when no known layout claims it."""
    for pattern in ("*.nii*", "*/*.nii*", "**/*.nii*"):
        found = next((path for path in sorted(root.glob(pattern)) if is_nifti(path.name)), None)
        if found is not None:
            return Recognition(0.1, f"no known layout, but NIfTI files such as {found.relative_to(root).as_posix()}")
    return Recognition(0.0, "no NIfTI file")


def discover(root: str | Path, *, pattern: str = "", label: str = "", modality: str = "") -> Discovery:
    """List the files that match a pattern.

    Args:
        root: The folder.
        pattern: Path below the root with fields in braces: `{subject}` (required), any other manifest column or a name
            of your own. A field holds no `/`; a field that occurs twice must hold the same text both times; `*` and
            `**/` match anything. A file that can be read in two ways is skipped. Without a pattern every NIfTI file is
            one subject, folders that are named like label folders excepted.
        label: Pattern of the label map, made from the same fields, such as `labels/{subject}.nii.gz`.
        modality: Modality of every volume, such as "T1w".

    Raises:
        ConfigError: If a pattern cannot be used.
        DataError: If nothing matches.
    """
    folder = existing_folder(root)
    skipped: list[Skipped] = []
    files = list_files(folder, skipped)
    used: set[str] = set()
    labels: set[str] = set()
    _check(pattern, label)
    rows: list[dict[str, Any]] = []
    for path, fields in _matches(files, pattern, skipped, used):
        row: dict[str, Any] = {"session": None, "modality": modality or None, **fields, "image": path, "label": None}
        if label:
            expected = _FIELD.sub(partial(_fill, fields), label)
            if (folder / expected).is_file():
                row["label"] = expected
                labels.add(expected)
            else:
                skipped.append(Skipped(expected, f"label map of {path} is missing; the volume is listed without one"))
        rows.append(row)
    rows = [row for row in rows if row["image"] not in labels]
    rows.sort(key=lambda row: natural_key(f"{row['subject']} {row['session'] or ''} {row['image']}"))
    skipped += leftovers(files, used | labels, f"pattern {pattern}" if pattern else "NIfTI folder")
    meta = ManifestMeta(name=folder.resolve().name, cohort="folder", modality=modality)
    return Discovery(build_table(rows, root=folder, layout="folder"), meta, skipped, "folder")


def _check(pattern: str, label: str) -> None:
    fields = _FIELD.findall(pattern)
    if pattern and "subject" not in fields:
        raise ConfigError("the pattern has no {subject}", found=pattern, fix="name it, as in {subject}_T1.nii.gz")
    reserved = _RESERVED & set(fields)
    if reserved:
        raise ConfigError(f"{{{min(reserved)}}} cannot be a field of the pattern", found=pattern)
    adjacent = re.search(r"\}\{|\}\*|\*\{", pattern.replace("**/", ""))
    if adjacent:
        raise ConfigError(
            "two fields or stars touch, so that the boundary is unknown", found=pattern, fix="put text between them"
        )
    known = fields if pattern else ["subject"]
    unknown = [name for name in _FIELD.findall(label) if name not in known]
    if unknown or "*" in label:
        raise ConfigError(
            "the label pattern may only use the fields of the image pattern, and no star",
            found=label,
            fix=f"known fields: {', '.join(dict.fromkeys(known))}",
        )


def _matches(
    files: list[str], pattern: str, skipped: list[Skipped], used: set[str]
) -> list[tuple[str, dict[str, Any]]]:
    """(path, fields) of the files to list; the reasons of the others go to `skipped`."""
    if not pattern:
        return _every_nifti(files, skipped, used)
    lazy, greedy = _compile(pattern, "+?"), _compile(pattern, "+")
    found = []
    for path in files:
        match, other = lazy.fullmatch(path), greedy.fullmatch(path)
        if match is None or other is None or junk_reason(path):
            continue
        used.add(path)
        if match.groupdict() != other.groupdict():
            why = f"the pattern reads it in two ways: {match.groupdict()} or {other.groupdict()}"
            skipped.append(Skipped(path, why))
        else:
            found.append((path, match.groupdict()))
    return found


def _every_nifti(files: list[str], skipped: list[Skipped], used: set[str]) -> list[tuple[str, dict[str, Any]]]:
    images = []
    for path in filter(is_nifti, files):
        used.add(path)
        folder = next((part for part in PurePosixPath(path).parts[:-1] if _LABEL_FOLDER.match(part)), None)
        if folder is None:
            images.append(path)
        else:
            skipped.append(
                Skipped(path, f"`{folder}` is named like a folder of label maps; give `pattern` and `label`")
            )
    stems = [stem(path) for path in images]
    unique = len(set(stems)) == len(stems)
    names = stems if unique else [str(PurePosixPath(path).parent / stem(path)).replace("/", "_") for path in images]
    return [(path, {"subject": name}) for path, name in zip(images, names)]


def _fill(values: dict[str, Any], found: re.Match[str]) -> str:
    return str(values[found[1]])


def _compile(pattern: str, repeat: str) -> re.Pattern[str]:
    """The pattern as a regular expression, each field lazy (`+?`) or greedy (`+`)."""
    expression, seen = "", set()
    for piece in re.split(r"(\{[A-Za-z_][A-Za-z0-9_]*\}|\*\*/|\*)", pattern):
        field = _FIELD.fullmatch(piece)
        if field and field[1] in seen:
            expression += f"(?P={field[1]})"
        elif field:
            seen.add(field[1])
            expression += f"(?P<{field[1]}>[^/]{repeat})"
        elif piece == "**/":
            expression += "(?:.*/)?"
        elif piece == "*":
            expression += "[^/]*"
        else:
            expression += re.escape(piece)
    return re.compile(expression)
