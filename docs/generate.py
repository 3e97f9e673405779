"""Write the generated parts of the pages in this folder, and a page of each method: `python docs/generate.py`.

A generated part lies between `<!-- generated: NAME -->` and `<!-- end of generated part -->`. Everything in it comes
from the package: keys, defaults and limits from the configuration classes, meanings from the text under each field,
names and sources from the tables of methods, encoders, samplers, cohorts and check codes. The pages in `methods/` are
generated as a whole: texts from the docstring of each method, recipes from `configs/`, results from
`results/comparison.csv`.
"""

from __future__ import annotations

import ast
import csv
import functools
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any, Final, Literal

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from medssl.config import AgeSiteProtocol, ArmCombat, CompareArm, CompareConfig, FinetuneConfig, PretrainConfig
from medssl.config.few_label import FewLabelProtocol, FinetuneSection, Stage
from medssl.config.models import RunConfig
from medssl.core.types import Needs
from medssl.data.cohorts import COHORTS
from medssl.data.integrity import CODES
from medssl.data.regions import REGION_MAP, RegionsConfig
from medssl.methods import METHODS, TASKS, EnDConfig, FairKLConfig, TargetConfig
from medssl.methods.decoupled_uniformity import PriorConfig
from medssl.methods.kernels import AttributeKernel, KernelConfig
from medssl.methods.targets import LastBlocks
from medssl.models import ENCODERS
from medssl.samplers import SAMPLERS
from medssl.transforms.augment_config import AugmentConfig, CropSet
from medssl.transforms.views import PRESETS, Artefact

FOLDER: Final = Path(__file__).parent
PART: Final = re.compile(r"(<!-- generated: ([a-z_-]+) -->\n).*?(<!-- end of generated part -->)", re.DOTALL)

# Fields whose name says it all in the code, in the words of this page.
PLAIN: Final = {
    "RunConfig.name": "Name of the run and of its folder: letters, digits, `.`, `_`, `-`.",
    "RunConfig.seed": "Determines every random choice.",
    "RunConfig.data": "Which volumes, and how they are prepared.",
    "RunConfig.items": "What one training item is.",
    "RunConfig.model": "The network.",
    "RunConfig.views": "Augmented copies of each item.",
    "RunConfig.optimizer": "How weights are updated.",
    "RunConfig.schedule": "How the learning rate moves.",
    "RunConfig.training": "Budget, device, checkpoints, logs.",
    "PretrainConfig.kind": "The kind of run.",
    "PretrainConfig.method": "What is learnt.",
    "PretrainConfig.sampler": "Which items form a batch.",
    "FinetuneConfig.kind": "The kind of run.",
    "CompareConfig.kind": "The kind of run.",
    "CompareArm.name": "In tables and folder names.",
    "FinetuneConfig.task": "What is learnt.",
    "FinetuneConfig.batch_size": "Items in a global batch, equally many of every labelled volume.",
    "FinetuneConfig.grid": "Arms, label fractions, draws and seeds.",
    "FinetuneConfig.inference": "How whole volumes are predicted.",
    "FinetuneConfig.save_predictions": "Label maps of the evaluated volumes as NIfTI; `none` also leaves out overlays.",
    "DataConfig.prepare": "What is done to every volume, once.",
    "PrepareConfig.orientation": "Axes of prepared volumes.",
    "PrepareConfig.lower": "Percentile that becomes 0.",
    "PrepareConfig.upper": "Percentile that becomes 1.",
    "ModelConfig.encoder": "By name, with its settings.",
    "ArmConfig.name": "In tables and folder names.",
    "GridConfig.arms": "The first is the baseline of every comparison.",
    "GridConfig.n_labelled": "Label fractions, in volumes.",
    "GridConfig.draws": "How often each number of labelled volumes is drawn.",
    "GridConfig.seeds": "Each cell is trained once with each seed; the upper bound with the first only.",
    "TrainingConfig.accelerator": "Where to train; `gpu` refuses to start without one.",
    "TrainingConfig.nodes": "Machines.",
    "TrainingConfig.strategy": "`auto`: DDP as soon as there are several processes.",
    "TrainingConfig.tensorboard": "Also write TensorBoard events.",
    "Cutout.fill": "Intensity inside the box.",
    "Artefact.name": "Which.",
}
COMMON: Final = {"name": "Says which.", "probability": "How often it is applied."}


# -- configuration classes in words -----------------------------------------------------------------------------------


def field_texts(model: type[BaseModel]) -> dict[str, str]:
    """The string under each field of a class and its bases, as one line."""
    texts: dict[str, str] = {}
    for cls in reversed([c for c in model.__mro__ if issubclass(c, BaseModel) and c.__module__.startswith("medssl")]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        for statement, after in zip(body, [*body[1:], None]):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            name = statement.target.id
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                texts[name] = _for_yaml(after.value.value)
            elif f"{cls.__name__}.{name}" in PLAIN:
                texts[name] = PLAIN[f"{cls.__name__}.{name}"]
            elif name in COMMON:
                texts.setdefault(name, COMMON[name])
    return texts


def _for_yaml(text: str) -> str:
    return re.sub(r"\bNone\b", "null", " ".join(text.replace("``", "`").split()))


def takes(annotation: Any, limits: Iterable[Any] = ()) -> str:
    """The values that an annotation allows, in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return takes(arguments[0], [*limits, *arguments[1:]])
    if origin in (typing.Union, types.UnionType):
        parts = [one for one in arguments if one is not types.NoneType]
        if all(isinstance(one, type) and issubclass(one, BaseModel) for one in parts) and len(parts) > 1:
            return "section by `name`"
        words = list(dict.fromkeys(takes(one, limits) for one in parts))
        return " or ".join([*words, *(["null"] if types.NoneType in arguments else [])])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {takes(arguments[0])}"
        return "[" + ", ".join(takes(one) for one in arguments) + "]"
    if origin in (dict, Mapping):
        return f"mapping of {takes(arguments[0])} to {takes(arguments[1])}"
    return _plain(annotation) + _limits(limits)


def _plain(annotation: Any) -> str:
    if isinstance(annotation, type):
        if issubclass(annotation, BaseModel):
            return "section"
        if issubclass(annotation, PurePath):
            return "path"
        names = {bool: "true, false", int: "whole number", float: "number", str: "text"}
        for kind, word in names.items():
            if annotation is kind:
                return word
    raise TypeError(f"no words for {annotation!r}: extend docs/generate.py")


def _limits(limits: Iterable[Any]) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    flat = [inner for one in limits for inner in (one, *getattr(one, "metadata", ()))]
    found = [f"{sign} {getattr(one, key):g}" for one in flat for key, sign in signs.items() if _has(one, key)]
    return "".join(f" {text}" if i == 0 else f" and {text}" for i, text in enumerate(dict.fromkeys(found)))


def _has(one: Any, key: str) -> bool:
    return isinstance(getattr(one, key, None), (int, float))


def default_of(field: Any) -> str:
    """A default as one would write it in YAML."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "its defaults"
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, BaseModel):
        given = value.model_dump(mode="python", exclude_defaults=True)
        return _yaml({"name": value.name} if not given and hasattr(value, "name") else given)
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_yaml(one) for one in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_yaml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) or '""'


def class_table(model: type[BaseModel], *, only: Iterable[str] | None = None) -> str:
    """Every key of a section: what it takes, its default, what it means."""
    texts = field_texts(model)
    rows = []
    for name, field in model.model_fields.items():
        if only is not None and name not in only:
            continue
        if not texts.get(name):
            raise ValueError(f"{model.__name__}.{name} has no text: write one under the field, or in docs/generate.py")
        rows.append((f"`{name}`", takes(field.annotation, field.metadata), default_of(field), texts[name]))
    return table(("key", "takes", "default", "meaning"), rows)


def table(head: tuple[str, ...], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# -- the parts --------------------------------------------------------------------------------------------------------


def both_kinds() -> str:
    """Keys that every run has."""
    return class_table(RunConfig)


def sections_of_every_run() -> str:
    """The shared sections."""
    fields = RunConfig.model_fields
    data = fields["data"].annotation
    parts = [("`data`", data), ("`data.prepare`", data.model_fields["prepare"].annotation)]
    parts += [(f"`{name}`", fields[name].annotation) for name in ("items", "model")]
    text = [f"### {title}\n\n{class_table(model)}" for title, model in parts]
    text += [_named("model.encoder", ENCODERS)]
    names = ("views", "optimizer", "schedule", "training")
    text += [f"### `{name}`\n\n{class_table(fields[name].annotation)}" for name in names]
    return "\n\n".join(text)


def pretrain_sections() -> str:
    """What a pretraining adds."""
    own = [name for name in PretrainConfig.model_fields if name not in RunConfig.model_fields]
    shared = {
        "method.kernel": KernelConfig,
        "method.kernel.attributes`, each: `COLUMN": AttributeKernel,
        "method.prior": PriorConfig,
        "method.regions": RegionsConfig,
        "debias`, name `fair_kl": FairKLConfig,
        "debias`, name `end": EnDConfig,
        "debias.target": TargetConfig,
    }
    return "\n\n".join(
        [
            class_table(PretrainConfig, only=own),
            _named("method", METHODS),
            *(
                f"### `{title}`\n\n{_sentence(_summary(model))}\n\n{class_table(model)}"
                for title, model in shared.items()
            ),
            _named("sampler", SAMPLERS),
        ]
    )


def finetune_sections() -> str:
    """What a fine-tuning adds."""
    fields = FinetuneConfig.model_fields
    own = [name for name in fields if name not in RunConfig.model_fields]
    task = TASKS["segmentation"].config
    mixup = next(one for one in typing.get_args(task.model_fields["mixup"].annotation) if one is not types.NoneType)
    grid = fields["grid"].annotation
    arm = typing.get_args(grid.model_fields["arms"].annotation)[0]
    return "\n\n".join(
        [
            class_table(FinetuneConfig, only=own),
            _named("task", TASKS),
            f"### `task.train`, as `{{last_blocks: k}}`\n\n{class_table(LastBlocks)}",
            f"### `task.mixup`\n\n{_summary(mixup)}\n\n{class_table(mixup)}",
            f"### `grid`\n\n{class_table(grid)}",
            f"### `grid.arms`, each\n\n{class_table(arm)}",
            f"### `inference`\n\n{class_table(fields['inference'].annotation)}",
        ]
    )


def compare_sections() -> str:
    """What a comparison adds."""
    own = [name for name in CompareConfig.model_fields if name not in RunConfig.model_fields]
    parts = {
        "arms`, each": CompareArm,
        "arms`, each: `combat`": ArmCombat,
        "arms`, each: `stages`, each": Stage,
        "protocol`, name `age_site`": AgeSiteProtocol,
        "protocol`, name `few_label`": FewLabelProtocol,
        "protocol`, name `few_label`: `finetune`": FinetuneSection,
    }
    text = [f"### `{title}\n\n{_sentence(_summary(model))}\n\n{class_table(model)}" for title, model in parts.items()]
    return "\n\n".join([class_table(CompareConfig, only=own), *text])


def _named(section: str, entries: Mapping[str, Any]) -> str:
    text = []
    for name, entry in entries.items():
        summary = getattr(entry, "summary", None) or _summary(entry)
        source = f" {entry.source}." if getattr(entry, "source", "") else ""
        text.append(f"### `{section}`, name `{name}`\n\n{_sentence(summary)}{source}\n\n{class_table(entry.config)}")
    return "\n\n".join(text)


def _sentence(text: str) -> str:
    first = text.split()[0]
    capital = first.capitalize() if first.isalpha() and first.islower() and len(first) > 1 else first
    return capital + text[len(first) :].rstrip(".") + "."


def _summary(cls: type) -> str:
    return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("``", "`").split())


def augment() -> str:
    """Operations of a policy, artefacts, presets."""
    text = []
    others = []
    for name, field in AugmentConfig.model_fields.items():
        inner = [
            one for one in typing.get_args(field.annotation) if inspect.isclass(one) and issubclass(one, BaseModel)
        ]
        if not inner:
            others.append(name)
            continue
        text.append(f"### `augment.{name}`\n\n{_summary(inner[0])}\n\n{class_table(inner[0])}")
    text.append(f"### `augment`, other keys\n\n{class_table(AugmentConfig, only=others)}")
    text.append(f"### `crops`, each\n\n{_summary(CropSet)}\n\n{class_table(CropSet)}")
    text.append(f"### `artefacts`, each\n\n{_summary(Artefact)}\n\n{class_table(Artefact)}")
    rows = [(f"`{name}`", _policy(policy)) for name, policy in PRESETS.items()]
    return "\n\n".join([*text, f"### Presets\n\n{table(('preset', 'policy'), rows)}"])


def _policy(policy: AugmentConfig) -> str:
    parts = []
    for name in AugmentConfig.model_fields:
        value = getattr(policy, name)
        if value is not None:
            parts.append(f"`{name}: {_yaml(value.model_dump() if isinstance(value, BaseModel) else value)}`")
    return "<br>".join(parts) or "nothing"


def cohorts() -> str:
    """Layouts that `data scan` reads."""
    rows = []
    for name, cohort in COHORTS.items():
        options = [
            parameter.name
            for parameter in inspect.signature(cohort.discover).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY
        ]
        rows.append(
            (f"`{name}`", cohort.summary, cohort.looks_for, ", ".join(f"`{option}`" for option in options) or "none")
        )
    return table(("`--kind`", "what", "recognised by", "options"), rows)


def codes() -> str:
    """What a check can report."""
    return table(("code", "meaning"), [(f"`{code}`", text) for code, text in CODES.items()])


def methods() -> str:
    """Methods with their needs."""
    rows = []
    for name, entry in METHODS.items():
        needs = entry.config().needs()
        rows.append(
            (f"[`{name}`](methods/{name}.md)", entry.summary, entry.source, _needs(needs), ", ".join(needs.trains))
        )
    return table(("name", "what it does", "source", "needs (default settings)", "trains"), rows)


def _needs(needs: Needs) -> str:
    words = [
        f"{needs.views} view{'s' if needs.views > 1 else ''}" + (", view 0 the item itself" if needs.original else "")
    ]
    if needs.moves == "none":
        words.append("intensities only")
    words.append("sampler " + (" or ".join(f"`{one}`" for one in sorted(needs.samplers)) or "any"))
    words += ["partitions"] if needs.partitions else []
    words += ["decoder blocks"] if needs.decoder else []
    columns = [f"`{one}`" for one in needs.labels if one != REGION_MAP]
    words += [f"column {' and '.join(columns)}"] if columns else []
    words += ["regions, which the run finds"] if REGION_MAP in needs.labels else []
    words.append(", ".join(f"{dims}D" if dims else "tables" for dims in sorted(needs.spatial_dims)))
    return "; ".join(words)


# -- a page of each method --------------------------------------------------------------------------------------------

SECTIONS: Final = {"Formula": "Formula", "Use it when": "Use it when", "Leave it when": "Leave it when"}
NOT_SHOWN: Final = ("Attributes", "Raises")
HEADING: Final = re.compile(r"([A-Z][a-z ]+):")


def docstring_parts(method: type) -> dict[str, str]:
    """The docstring of a method by part: `source`, `what`, the names of ``SECTIONS``, and `notes`.

    The first paragraph is the source; a line `Name:` by itself begins a part, whose lines are indented; what stands
    before the first of them says what the method is, and what comes after without indentation is a note.
    """
    source, _, rest = inspect.cleandoc(method.__doc__ or "").partition("\n\n")
    parts = {"source": [source], "what": [], "notes": []}
    into = "what"
    for line in rest.splitlines():
        begins = HEADING.fullmatch(line)
        if begins and begins[1] in (*SECTIONS, *NOT_SHOWN):
            into = begins[1]
            parts[into] = []
        else:
            if line and not line.startswith(" ") and into != "what":
                into = "notes"
            parts[into].append(line)
    return {name: textwrap.dedent("\n".join(lines)).strip().replace("``", "`") for name, lines in parts.items()}


def _formulas(text: str) -> str:
    """Each formula as a paragraph of its own, as GitHub wants it."""
    apart = re.sub(r"\s*\$\$\s*(.*?)\s*\$\$\s*", r"\n\n$$\n\1\n$$\n\n", text, flags=re.DOTALL)
    lines = "\n".join(line.strip() for line in apart.splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


@functools.cache
def all_recipes() -> tuple[tuple[str, Path, str, str], ...]:
    """Every pretraining in `configs/`: method, file, first line of its comment, and how far it has been tried."""
    found = []
    for path in sorted((FOLDER.parent / "configs").rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text) or {}
        if values.get("kind") == "pretrain":
            title = text.splitlines()[0].lstrip("# ").rstrip(".") if text.startswith("#") else ""
            file = path.relative_to(FOLDER.parent)
            found.append((values["method"]["name"], file, title, values.get("status", "")))
    return tuple(found)


def results(name: str) -> list[dict[str, str]]:
    """The rows of the comparison on real data whose column `method` names this method."""
    path = FOLDER / "results" / "comparison.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if name in row.get("method", "").replace("+", " ").split()]


def method_page(name: str) -> str:
    """The page of one method.

    Raises:
        ValueError: Its docstring lacks a part.
    """
    entry = METHODS[name]
    parts = docstring_parts(entry.method)
    missing = [part for part in ("source", "what", *SECTIONS) if not parts.get(part)]
    if missing:
        raise ValueError(f"the docstring of method {name} has no part: {', '.join(missing)}")
    needs = entry.config().needs()
    text = [
        f"# {name}\n\n<!-- written by docs/generate.py from the docstring of {entry.method.__name__}: edit that -->",
        f"{_sentence(entry.summary)} {' '.join(parts['source'].split())}",
        parts["what"],
        *(f"## {title}\n\n{_formulas(parts[part])}" for part, title in SECTIONS.items()),
        f"## Needs\n\nWith default settings: {_needs(needs)}. {_leaves(needs)}",
        f"## Settings\n\n`method: {{name: {name}, ...}}`\n\n{class_table(entry.config)}",
    ]
    if parts["notes"]:
        text.append(f"## Notes\n\n{parts['notes']}")
    rows = [
        (f"[{path.as_posix()}](../../{path.as_posix()})", title, status)
        for method, path, title, status in all_recipes()
        if method == name
    ]
    text.append("## Recipes\n\n" + (table(("file", "what", "tried"), rows) if rows else "None yet."))
    scores = results(name)
    if scores:
        body = table(tuple(scores[0]), [list(row.values()) for row in scores])
        about = (
            "How these numbers came about, and how little a tiny budget shows: [comparison](../results/comparison.md)."
        )
        text.append(f"## Results on real data\n\n{body}\n\n{about}")
    text.append("[All methods](../methods.md)")
    return "\n\n".join(text) + "\n"


def _leaves(needs: Needs) -> str:
    """What a method wants of a batch and leaves behind, in a sentence or two."""
    batch = f"A batch has at least {needs.min_batch} items. " if needs.min_batch > 1 else ""
    crops = "It takes small crops (`views.crops`). " if needs.multi_crop else ""
    added = ""
    if needs.features:
        added = f" A regulariser (`debias`) can work on {' and '.join(needs.features)}."
    return f"{batch}{crops}It trains the {' and the '.join(needs.trains)}.{added}"


def method_pages() -> dict[Path, str]:
    """Every page of `methods/`."""
    return {FOLDER / "methods" / f"{name}.md": method_page(name) for name in METHODS}


PARTS: Final[Mapping[str, Callable[[], str]]] = {
    "both-kinds": both_kinds,
    "sections": sections_of_every_run,
    "pretrain": pretrain_sections,
    "finetune": finetune_sections,
    "compare": compare_sections,
    "augment": augment,
    "cohorts": cohorts,
    "codes": codes,
    "methods": methods,
}


def generated(text: str) -> str:
    """The same page with its generated parts written anew."""
    return PART.sub(lambda match: f"{match[1]}\n{PARTS[match[2]]()}\n\n{match[3]}", text)


def main() -> None:
    """Rewrite the pages."""
    for page in sorted(FOLDER.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        page.write_text(generated(text), encoding="utf-8")
    pages = method_pages()
    (FOLDER / "methods").mkdir(exist_ok=True)
    for page in set((FOLDER / "methods").glob("*.md")) - set(pages):
        page.unlink()
    for page, text in pages.items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
