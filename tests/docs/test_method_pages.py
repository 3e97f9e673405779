"""A page for each method, generated from its docstring, its settings, the recipes and the results."""

import importlib.util
import re
from pathlib import Path

import pytest

from medssl.core.types import Method
from medssl.methods import METHODS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", METHODS)
def test_docstrings_have_every_part_in_the_words_of_the_method(generator, name):
    parts = generator.docstring_parts(METHODS[name].method)
    for part in ("source", "what", *generator.SECTIONS):
        assert len(parts.get(part, "")) > 20, f"{name}: {part}"
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|doi:10\.", parts["source"]), name
    assert 2 <= len(re.findall(r"[.?](?:\s|$)", parts["what"])) <= 7, f"{name}: about three sentences"
    assert re.search(r"\$\$.+\$\$", parts["Formula"], re.DOTALL), name
    letters = re.sub(r"\$\$.+?\$\$", "", parts["Formula"], flags=re.DOTALL)
    assert len(letters.split()) > 10, f"{name}: say what the letters are"
    assert parts["Formula"].count("{") == parts["Formula"].count("}"), name
    assert not re.search(r"[\a\b\f\r\t\v]", METHODS[name].method.__doc__), f"{name}: LaTeX needs a raw docstring"


def test_every_page_is_current_and_none_is_left_over(generator):
    pages = generator.method_pages()
    assert set(pages) == set((ROOT / "docs" / "methods").glob("*.md"))
    old = [page.name for page, text in pages.items() if page.read_text(encoding="utf-8") != text]
    assert old == [], "run python docs/generate.py"


def test_the_index_leads_to_every_page():
    index = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert [name for name in METHODS if f"](methods/{name}.md)" not in index] == []


def test_a_page_has_formula_settings_recipes_and_results(generator, tmp_path, monkeypatch):
    page = generator.method_page("swav")
    order = ["# swav", "\n$$\n", "## Use it when", "## Leave it when", "## Needs", "## Settings", "## Recipes"]
    places = [page.index(heading) for heading in order]
    assert places == sorted(places)
    assert "| `n_prototypes` | whole number > 0 | `32` |" in page
    assert "(../../configs/hippocampus/swav.yaml)" in page
    assert "\n\n\n" not in page
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "comparison.csv").write_text("method,dice\nswav,0.61\nsimclr,0.60\n")
    monkeypatch.setattr(generator, "FOLDER", tmp_path)
    assert generator.results("swav") == [{"method": "swav", "dice": "0.61"}]
    assert generator.results("gcl") == []
    assert "| swav | 0.61 |" in generator.method_page("swav")


def test_a_docstring_without_a_part_is_named(generator, monkeypatch):
    class Bare(Method):
        """Somebody 2020 (arXiv:2001.00001).

        What it is.

        Formula:
            $$ x $$ letters
        """

        def training_loss(self, batch):
            raise NotImplementedError

    entry = METHODS["swav"]
    bare = type(entry)(entry.config, Bare, entry.summary, entry.source)
    monkeypatch.setattr(generator, "METHODS", {"swav": bare})
    with pytest.raises(ValueError, match="method swav has no part: Use it when, Leave it when"):
        generator.method_page("swav")
