"""What the pages say is true: links lead somewhere, code runs, configurations validate, generated parts are current."""

import importlib.util
import re
from pathlib import Path

import pytest

from medssl.config import CONFIGS
from medssl.core.files import parse_yaml
from medssl.core.schema import validate
from medssl.data.manifest import ManifestMeta
from medssl.transforms.views import ViewsConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "data_manifests").rglob("*.md")])
TEXT = {".md", ".py", ".yaml", ".yml", ".toml", ".cfg", ".csv", ".j2", ".html", ".txt", ".sh", ""}
OUTSIDE = re.compile(r"(?<![\w.])/work/|\.\./shared|/tmp/interfaces")
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def load_generator():
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, language: str) -> list[str]:
    return [match[3] for match in FENCE.finditer(page.read_text()) if match[2] == language]


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    prose = FENCE.sub("", page.read_text())
    titles = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or not there.is_relative_to(ROOT):
            broken.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(there):
            broken.append(f"{target}: no such heading")
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    assert broken_links(page) == []


def test_a_broken_link_would_be_noticed(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](#a-title) [b](#another) [c](gone.md) [d](https://example.org)\n")
    assert broken_links(page) == ["#another: no such heading", "gone.md: no such file"]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Future annotations of this file must not reach the blocks: pydantic would not find their names.
    names = {"__name__": f"docs_{page.stem}"}
    for number, code in enumerate(blocks(page, "python"), start=1):
        exec(compile(code, f"{name_of(page)}, block {number}", "exec", dont_inherit=True), names)


def test_examples_show_every_kind_of_addition():
    code = "\n".join(blocks(ROOT / "CONTRIBUTING.md", "python"))
    for table in ("METHODS", "COHORTS", "ENCODERS", "medssl.losses"):
        assert table in code


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=name_of)
def test_yaml_blocks_validate(page):
    for code in blocks(page, "yaml"):
        values = parse_yaml(code, source=name_of(page))
        if "kind" in values:
            validate(CONFIGS[values["kind"]], values, source=name_of(page))
        elif set(values) == {"views"}:
            validate(ViewsConfig, values["views"], source=name_of(page))
        else:
            validate(ManifestMeta, values, source=name_of(page))


def test_every_kind_of_run_is_shown_complete():
    shown = [parse_yaml(code, source=name_of(page)) for page in PAGES for code in blocks(page, "yaml")]
    assert {values.get("kind") for values in shown} >= set(CONFIGS)


def test_generated_parts_are_current():
    generator = load_generator()
    seen = set()
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = page.read_text()
        seen |= {match[2] for match in generator.PART.finditer(text)}
        assert generator.generated(text) == text, f"{name_of(page)} is old: run python docs/generate.py"
    assert seen == set(generator.PARTS)


def test_every_command_in_the_pages_exists():
    from typer.main import get_command

    from medssl.cli.main import app

    root = get_command(app)
    lines = [line for page in PAGES for code in blocks(page, "sh") for line in code.replace("\\\n", " ").splitlines()]
    commands = [line.split("#")[0].split() for line in lines if line.startswith("medssl ")]
    assert len(commands) > 15
    for words in commands:
        command, options = root, []
        for word in words[1:]:
            if not options and word in getattr(command, "commands", {}):
                command = command.commands[word]
            elif word.startswith("-"):
                options.append(word)
        assert not hasattr(command, "commands"), " ".join(words)
        known = {name for parameter in command.params for name in parameter.opts}
        assert set(options) <= known, " ".join(words)


def tracked_text() -> list[Path]:
    folders = ("medssl", "docs", "configs", "data_manifests", "benchmarks", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    return [
        path for path in files if path.suffix in TEXT and "__pycache__" not in path.parts and path != Path(__file__)
    ]


def test_nothing_points_outside_the_repository():
    found = [
        f"{name_of(path)}: {match[0]}"
        for path in tracked_text()
        for match in OUTSIDE.finditer(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert found == []
