"""A generated cohort in the public layout of OpenBHB: brains that age, at sites that differ, some of them unseen.

As in reality, site and age are confounded: every site recruits from an age range of its own, and the ranges overlap.
Whoever knows the age can therefore guess the site somewhat better than by chance. A site changes contrast, coil, noise
and resolution of its images (`synthetic_brain`); grey matter maps and measures of regions are computed from the image,
with one fixed rule for all, so they carry the site as well. None of this is a patient.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from medssl.core.errors import ConfigError
from medssl.core.files import atomic_write
from medssl.core.seeding import COHORT, numpy_rng
from medssl.data.cohorts import openbhb
from medssl.data.cohorts.synthetic_brain import FIELD_OF_VIEW, Head, Site, centred_grid, draw_head_of, draw_site
from medssl.data.manifest import write_manifest
from medssl.data.volume import write_nifti

VERSION: Final = 1  # raised when the same seed would give other arrays
KIND: Final = 2  # among the synthetic cohorts: cardiac 0, brain 1
AGES: Final = (18.0, 86.0)
MASK: Final = "resource/cat12vbm_space-MNI152_desc-gm_TPM.nii.gz"
N_TEMPLATE: Final = 12
REGIONS: Final[Mapping[openbhb.Modality, int]] = {"roi_cat12": 142, "roi_desikan": 34, "roi_destrieux": 74}
"""Regions of a hemisphere."""
# Stand-ins for FreeSurfer's seven measures of a region, in its order.
MEASURES: Final = ("area", "volume", "thickness", "thicknessstd", "meancurv", "gauscurv", "curvind")
_PERSON, _SITE, _TEMPLATE = 0, 1, 2
Array = np.ndarray
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Settings:
    """What determines a cohort.

    Attributes:
        n_subjects: People, one scan each.
        seed: The same seed gives the same arrays (with the same versions of NumPy and SciPy).
        shape: Voxels of every array along X, Y, Z. The real maps have 121 x 145 x 121 (about 0.7 s each).
        sites: Sites that train; every fifth of their people is in internal_test.
        external_sites: Sites that do not train; their people are external_test.
        external_share: Share of the people who are there.
        arrays: "vbm", "quasiraw", both or none.
        regions: Measures of regions as "tables" of everyone, as "people": files of one person each, "both" or "none".
    """

    n_subjects: int = 200
    seed: int = 0
    shape: Shape = (32, 32, 32)
    sites: int = 6
    external_sites: int = 3
    external_share: float = 0.2
    arrays: tuple[Literal["vbm", "quasiraw"], ...] = ("vbm",)
    regions: Literal["tables", "people", "both", "none"] = "tables"

    def __post_init__(self) -> None:
        problems = []
        if len(self.shape) != 3 or not all(16 <= length <= 256 for length in self.shape):
            problems.append(f"shape: three lengths of 16 to 256, found {self.shape}")
        if self.sites < 1 or self.external_sites < 0:
            problems.append(f"sites, external_sites: at least 1 and 0, found {self.sites}, {self.external_sites}")
        if not 0 <= self.external_share < 1:
            problems.append(f"external_share: from 0 to below 1, found {self.external_share}")
        if self.n_subjects < 1 or self.seed < 0:
            problems.append(f"n_subjects, seed: at least 1 and 0, found {self.n_subjects}, {self.seed}")
        if not set(self.arrays) <= {"vbm", "quasiraw"}:
            problems.append(f"arrays: vbm and quasiraw, found {', '.join(map(str, self.arrays))}")
        if self.regions not in ("tables", "people", "both", "none"):
            problems.append(f"regions: tables, people, both or none, found {self.regions}")
        if not problems and not self.arrays and self.regions == "none":
            problems.append("arrays, regions: nothing would be written")
        if problems:
            raise ConfigError("settings of the synthetic cohort are out of range", found="; ".join(problems))


@dataclass(frozen=True)
class Centre:
    """A site and the ages that it recruits."""

    number: int
    site: Site
    ages: tuple[float, float]


def generate(root: str | Path, **settings: Any) -> Path:
    """Write participants.tsv, arrays, measures of regions, a grey matter template, `manifest.csv` and a marker.

    Args:
        root: Folder to write to; made if missing. Generated files of the same names are replaced.
        settings: Of `Settings`; lists are taken for tuples.

    Returns:
        The manifest of the first kind of file that was asked for; `medssl data scan` writes those of the others.

    Raises:
        ConfigError: A setting is unknown or out of range.
    """
    chosen = _settings(settings)
    folder = Path(root)
    centres = draw_centres(chosen)
    people: list[dict[str, Any]] = []
    rows: dict[tuple[str, openbhb.Modality], list[Array]] = {}
    for index in range(chosen.n_subjects):
        person, head = draw_person(index, chosen, centres)
        tissue = segment(head)
        people.append({**person, **_volumes(tissue, head.spacing[0])})
        part = openbhb.FOLDERS[person["split"]]
        _write_person(folder / part / "derivatives", person["participant_id"], head, tissue, chosen)
        if chosen.regions in ("tables", "both"):
            for modality in REGIONS:
                rows.setdefault((part, modality), []).append(measures(tissue, modality).ravel())
    for (part, modality), values in rows.items():
        ids = [person["participant_id"] for person in people if openbhb.FOLDERS[person["split"]] == part]
        _write_table(folder / part / "derivatives" / openbhb.TABLES[modality], ids, values, modality)
    spacing = _voxel(chosen.shape)
    write_nifti(folder / MASK, template(chosen), np.diag([spacing, spacing, spacing, 1.0]), dtype=np.float32)
    atomic_write(folder / "participants.tsv", pd.DataFrame(people).to_csv(sep="\t", index=False, na_rep="n/a"))
    marker = {"version": VERSION, "note": "synthetic data, not patients", "settings": asdict(chosen)}
    atomic_write(folder / openbhb.SYNTHETIC_MARKER, json.dumps(marker, indent=1) + "\n")
    found = openbhb.discover(folder, modality=chosen.arrays[0] if chosen.arrays else "roi_cat12")
    write_manifest(found.table, found.meta, folder / "manifest.csv")
    return folder / "manifest.csv"


def _settings(values: Mapping[str, Any]) -> Settings:
    unknown = sorted(set(values) - set(Settings.__dataclass_fields__))
    if unknown:
        raise ConfigError(
            f"unknown setting of the synthetic cohort: {', '.join(unknown)}",
            fix=f"known: {', '.join(Settings.__dataclass_fields__)}",
        )
    given: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
    return Settings(**given)


def draw_centres(settings: Settings) -> list[Centre]:
    """The sites that train, then the unseen ones; each depends on the seed and its number alone.

    Age ranges are 28 to 56 years wide before they are cut to 18 to 86. Those of neighbouring numbers lie far apart, so
    that even two sites differ.
    """
    centres = []
    for number in range(settings.sites + settings.external_sites):
        rng = numpy_rng(COHORT, KIND, settings.seed, _SITE, number)
        # Steps of the golden ratio spread any number of middles evenly over 30 to 74 years.
        middle = 30 + 44 * ((number * 0.6180339887 + 0.1) % 1.0) + rng.normal(0, 2)
        half = rng.uniform(14, 28)
        ages = (max(AGES[0], middle - half), min(AGES[1], middle + half))
        centres.append(Centre(number, draw_site(rng, str(number)), (float(ages[0]), float(ages[1]))))
    return centres


def draw_person(index: int, settings: Settings, centres: Sequence[Centre]) -> tuple[dict[str, Any], Head]:
    """Person `index`: the line of participants.tsv without volumes, and the head. Depends on the seed and index."""
    rng = numpy_rng(COHORT, KIND, settings.seed, _PERSON, index)
    n_external = round(settings.n_subjects * settings.external_share) if settings.external_sites else 0
    if index < settings.n_subjects - n_external:
        centre = centres[index % settings.sites]
        split = "internal_test" if (index // settings.sites) % 5 == 4 else "train"
    else:
        centre = centres[settings.sites + (index - settings.n_subjects + n_external) % settings.external_sites]
        split = "external_test"
    age = float(rng.uniform(*centre.ages))
    sex = "F" if rng.random() < 0.5 else "M"
    head = draw_head_of(rng, centre.site, age=age, sex=sex, shape=settings.shape)
    person = {
        "participant_id": str(10**11 + (index + 1) * 618_033_988_747 % (9 * 10**11)),  # 12 digits, all different
        "study": centre.number // 4,
        "sex": {"F": "female", "M": "male"}[sex],
        "age": round(age, 1),
        "site": centre.number // 2,
        "diagnosis": "control",
        "magnetic_field_strength": 3.0 if centre.number % 3 else 1.5,
        "acquisition_setting": centre.number % 2,
        "siteXacq": centre.number,
        "split": split,
    }
    return person, head


def segment(head: Head) -> Array:
    """(3, X, Y, Z) float32: shares of grey matter, white matter and fluid by one fixed rule for every image.

    Intensities are divided by the brain's 90th percentile, which is white matter; grey matter is what lies about 0.66.
    A site whose contrast or coil differs is segmented differently, as real ones are.
    """
    brain = _brain(head.image.shape)
    image = head.image.astype(np.float32)
    level = image / np.percentile(image[brain > 0.5], 90)
    grey = np.clip(1 - np.abs(level - 0.66) / 0.3, 0, 1)
    white = np.clip((level - 0.66) / 0.3, 0, 1)
    fluid = np.clip((0.66 - level) / 0.3, 0, 1)
    return (np.stack([grey, white, fluid]) * brain).astype(np.float32)


def template(settings: Settings) -> Array:
    """(X, Y, Z): mean grey matter of people of all ages and sites, a stand-in for a tissue template."""
    maps = []
    for number, age in enumerate(np.linspace(*AGES, N_TEMPLATE)):
        rng = numpy_rng(COHORT, KIND, _TEMPLATE, number)
        site, sex = draw_site(rng, "template"), "FM"[number % 2]
        maps.append(segment(draw_head_of(rng, site, age=float(age), sex=sex, shape=settings.shape))[0])
    return np.mean(maps, axis=0)


def measures(tissue: Array, modality: openbhb.Modality) -> Array:
    """(1, 284) grey matter of regions, or (7, 68) or (7, 148) measures of regions, float32; left hemisphere first."""
    where, region, count = _regions(tissue.shape[1:], REGIONS[modality])
    grey, white, fluid = (part[where] for part in tissue)
    n = len(count)

    def total(values: Array) -> Array:
        return np.bincount(region, values, n)

    volume = total(grey)
    if modality == "roi_cat12":
        return volume[None].astype(np.float32)
    mean = volume / count
    spread = np.sqrt(np.maximum(total(grey**2) / count - mean**2, 0))
    thickness = volume / (volume + total(white) + 1)
    rows = [total(grey > 0.5), volume, thickness, spread, total(fluid) / count, total(white) / count]
    return np.stack([*rows, total(grey * fluid) / count]).astype(np.float32)


@lru_cache(maxsize=2)
def _brain(shape: Shape) -> Array:
    """(X, Y, Z) float32, 1 inside an average brain: what skull stripping against a template keeps."""
    x, y, z = centred_grid(shape, _voxel(shape))
    head = np.sqrt((x / 76) ** 2 + (y / 90) ** 2 + ((z - 4) / 84) ** 2)
    return np.clip(0.5 + (0.87 - head) * 20, 0, 1).astype(np.float32)


@lru_cache(maxsize=6)
def _regions(shape: Shape, n: int) -> tuple[Array, Array, Array]:
    """Indicator of brain voxels, the region of each of them, voxels of each region: `n` cells of a hemisphere."""
    inside = _brain(shape) > 0.5
    points = np.stack([axis[inside] for axis in centred_grid(shape, _voxel(shape))], axis=1)
    rng = numpy_rng(COHORT, KIND, n)
    direction = rng.normal(size=(n, 3))
    direction[:, 0] = np.abs(direction[:, 0])
    radius = rng.uniform(0.15, 0.9, (n, 1)) ** (1 / 3) / np.linalg.norm(direction, axis=1, keepdims=True)
    seeds = direction * radius * (68, 80, 75)
    right = points[:, 0] >= 0
    cell = cKDTree(seeds).query(np.abs(points) * (1, 0, 0) + points * (0, 1, 1))[1]
    region = cell + n * right
    return inside, region, np.maximum(np.bincount(region, minlength=2 * n), 1)


def _voxel(shape: Shape) -> float:
    return FIELD_OF_VIEW / min(shape)


def _volumes(tissue: Array, voxel: float) -> dict[str, float]:
    """Volumes in millilitres: intracranial, fluid, grey and white matter."""
    grey, white, fluid = (float(part.sum(dtype=np.float64)) * voxel**3 / 1000 for part in tissue)
    named = {"tiv": grey + white + fluid, "csfv": fluid, "gmv": grey, "wmv": white}
    return {name: round(value, 2) for name, value in named.items()}


def _write_person(derivatives: Path, subject: str, head: Head, tissue: Array, settings: Settings) -> None:
    folder = derivatives / f"sub-{subject}" / "ses-1"
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[openbhb.Modality, Array] = {}
    if "vbm" in settings.arrays:
        arrays["vbm"] = tissue[:1]
    if "quasiraw" in settings.arrays:
        arrays["quasiraw"] = head.image[None].astype(np.float32)
    if settings.regions in ("people", "both"):
        arrays |= {modality: measures(tissue, modality) for modality in REGIONS}
    for modality, array in arrays.items():
        np.save(folder / f"sub-{subject}_{openbhb.PEOPLE_FILES[modality]}.npy", array)


def _write_table(path: Path, ids: Sequence[str], rows: Sequence[Array], modality: openbhb.Modality) -> None:
    """One row a person; features in the order of the raveled array of one person."""
    regions = [f"{side}_region{number + 1:03d}" for side in ("lh", "rh") for number in range(REGIONS[modality])]
    names = [f"{one}_{measure}" for measure in MEASURES for one in regions]
    if modality == "roi_cat12":
        names = [f"{one}_GM_Vol" for one in regions]
    table = pd.DataFrame(np.stack(rows), columns=names)
    table.insert(0, "participant_id", ids)
    atomic_write(path, table.to_csv(index=False, float_format="%.6g"))
