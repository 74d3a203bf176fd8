"""Claims about the documentation: what it names exists, what it shows is accepted, nothing is left to be filled in."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from benchmarks import tables
from jobs.command_line import cli
from prismaquant_ray.config import Config
from prismaquant_ray.families import FAMILIES
from tests.architectures import REFUSED, WORKING
from tests.tiny import ARCHITECTURES
from tests.tiny_families import FAMILIES as TINY_FAMILIES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
#: `file.py::name`, as pytest writes it; also `Class.method` and constants of a module.
REFERENCE = re.compile(r"`([\w./]+\.py)::([\w.]+)`")
SPAN = re.compile(r"`([^`]+)`")
COMMAND = re.compile(r"(?:\bpq|prismaquant-ray|python -m jobs) ([a-z-]+)\b([^\n|]*)")
PATH = re.compile(r"`((?:prismaquant_ray|actors|jobs|benchmarks|tests|docs|configs|k8s)/[\w./-]*[\w/])`")
PLACEHOLDER = re.compile(r"@@[A-Z][^@]*@@")
#: Sections of docs/models.md.
MODELS = ("What is run", "What is refused")
#: Settings that only the log of experiments still names.
DELETED = {"allocation.interactions"}


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text())


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of every block of code."""
    for indent, language, body in FENCE.findall(page.read_text()):
        yield language, re.sub(f"^{indent}", "", body, flags=re.MULTILINE)


def code(page: Path) -> str:
    """Everything that stands as code: blocks and inline."""
    return "\n".join(
        [*(body for _, body in blocks(page)), *(span.replace("\n", " ") for span in SPAN.findall(prose(page)))]
    )


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@cache
def anchors(page: Path) -> frozenset[str]:
    return frozenset(slug(heading) for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE))


@cache
def names_in(path: Path) -> frozenset[str]:
    """What a Python file defines: functions, classes, their methods, and module constants."""
    found: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    visit(ast.parse(path.read_text()).body, "")
    return frozenset(found)


# --- what is named exists ---------------------------------------------------------------------------------------


@EACH_PAGE
def test_every_relative_link_resolves_to_a_file_and_a_heading(page: Path) -> None:
    broken = []
    for link in LINK.findall(prose(page)):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@EACH_PAGE
def test_every_file_function_and_test_named_exists(page: Path) -> None:
    missing = []
    for file, name in REFERENCE.findall(page.read_text()):
        path = ROOT / file
        if not path.is_file() or name not in names_in(path):
            missing.append(f"{file}::{name}")
    assert missing == []


def test_a_newcomers_question_is_answered_in_at_most_four_files() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("\n## Walks\n")[2].partition("\n## ")[0]
    questions = [line for line in section.splitlines() if "?" in line]
    files = [{*LINK.findall(line), *(file for file, _ in REFERENCE.findall(line))} for line in questions]
    assert len(files) >= 6
    assert all(2 <= len(named) <= 4 for named in files)


@EACH_PAGE
def test_every_path_named_exists(page: Path) -> None:
    missing = [path for path in PATH.findall(page.read_text()) if not (ROOT / path).exists()]
    assert missing == [] or page.name == "log.md"


def test_every_file_that_the_contribution_guide_leads_to_exists() -> None:
    missing = []
    for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
        folder = ROOT
        for path in re.findall(r"`([\w/]+(?:\.py|/))`", line):
            # A file or folder without one of its own is beside the one named before it.
            found = ROOT / path if (ROOT / path).exists() else folder / path
            missing += [] if found.exists() else [path]
            folder = found.parent
    assert missing == []


def test_every_formula_names_its_code_and_a_test_that_proves_it() -> None:
    _, *sections = re.split(r"^## (.*)$", (ROOT / "docs" / "numerics.md").read_text(), flags=re.MULTILINE)
    formulas = dict(zip(sections[::2], sections[1::2], strict=True))
    assert len(formulas) >= 15
    for heading, text in formulas.items():
        code, _, tests = text.partition("\n- tests:")
        assert [name for file, name in REFERENCE.findall(code) if file.startswith("prismaquant_ray/")], heading
        proofs = [name for file, name in REFERENCE.findall(tests) if re.fullmatch(r"tests/(\w+/)?test_\w+\.py", file)]
        assert proofs, heading
        assert all(name.startswith("test_") for name in proofs), heading


def test_the_index_leads_to_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    led = {(index.parent / link.partition("#")[0]).resolve() for link in LINK.findall(index.read_text())}
    assert {page for page in PAGES if page.parent == index.parent} - led == {index}


# --- what is shown works ----------------------------------------------------------------------------------------


@EACH_PAGE
def test_every_command_and_its_options_are_real(page: Path) -> None:
    wrong = []
    for name, rest in COMMAND.findall(code(page)):
        command = cli.commands.get(name)
        known = {option for parameter in command.params for option in parameter.opts} if command else set()
        arguments = re.split(r" [#>&]|;|\s{2,}", rest)[0]
        unknown = set(re.findall(r"--[a-z0-9-]+", arguments)) - known - {"--help"}
        if command is None or unknown:
            wrong.append((name, *unknown))
    assert wrong == []


def test_every_command_is_in_the_readme_of_the_project() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for name in cli.commands if not re.search(rf"\b{name}\b", text)] == []


def configurations(page: Path) -> Iterator[dict[str, Any]]:
    """YAML blocks that begin with a section of the configuration; manifests of Kubernetes and the like do not."""
    for language, body in blocks(page):
        if language in ("yaml", "yml"):
            for document in yaml.safe_load_all(body):
                if isinstance(document, dict) and set(document) & set(Config.model_fields):
                    yield document


#: What a page leaves out of the configuration it shows.
REST: dict[str, Any] = {
    "model": {"source": "source"},
    "calibration": {"text": "calibration.txt"},
    "budget": {"bpp": 5.5},
    "store": {"run": "runs/run", "output": "runs/repository"},
}


@EACH_PAGE
def test_every_configuration_shown_is_accepted(page: Path) -> None:
    for shown in configurations(page):
        sections = {key: {**REST[key], **shown[key]} for key in REST.keys() & shown if key != "budget"}
        try:
            Config.model_validate({**REST, **shown, **sections})
        except ValidationError as error:
            pytest.fail(f"{shown}: {error}")


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """`section.key` of every setting, however deep; of a mapping with free keys only its own name."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from keys(part, f"{prefix}{name}.")


@EACH_PAGE
def test_every_setting_named_is_one(page: Path) -> None:
    sections = "|".join(name for name in Config.model_fields if name not in ("formats", "sweep"))
    named = set(re.findall(rf"(?:`|--set )((?:{sections})\.[a-z_][a-z_.]*[a-z])(?=[`:= ])", page.read_text()))
    past = DELETED if page.name == "log.md" else set()
    assert named - set(keys(Config)) - past == set()


def test_the_tables_of_the_performance_page_are_those_of_the_results() -> None:
    page = tables.PAGE.read_text()
    assert tables.filled(page) == page
    assert [name for name in tables.TABLES if f"<!-- {name} -->" not in page] == []


@pytest.mark.slow
def test_the_page_of_models_is_that_of_the_tests() -> None:
    render = runpy.run_path(str(ROOT / "docs" / "models.py"))["render"]
    page = (ROOT / "docs" / "models.md").read_text()
    assert render() == page, "run PYTHONPATH=. python docs/models.py > docs/models.md"


def test_every_architecture_of_a_family_or_of_the_tests_has_its_row() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    run, refused = (page.partition(f"\n## {title}\n")[2].partition("\n## ")[0] for title in MODELS)
    rows = [re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) for section in (run, refused)]
    known = [name for family in FAMILIES for name in family.architectures]
    assert sorted(rows[0]) == sorted({*known, *(each.name for each in WORKING.values())})
    assert sorted(rows[1]) == sorted(each.name for each, _ in REFUSED.values())
    ran = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| `\w+` \|([^|]*)\|", run, re.MULTILINE)))
    assert sorted(ran) == sorted([*ARCHITECTURES, *TINY_FAMILIES, *WORKING])


# --- nothing is left over ---------------------------------------------------------------------------------------


@EACH_PAGE
def test_no_output_is_left_to_be_filled_in(page: Path) -> None:
    assert PLACEHOLDER.findall(page.read_text()) == []


def test_the_checks_see_what_is_wrong() -> None:
    assert REFERENCE.findall("`a/b.py::C.d` and `tests/x.py::test_y` and `a.py`") == [
        ("a/b.py", "C.d"),
        ("tests/x.py", "test_y"),
    ]
    assert COMMAND.findall("prismaquant-ray nonsense x.yaml --set a=b") == [("nonsense", " x.yaml --set a=b")]
    assert LINK.findall("[a](b.md#c), ![d](e.png)") == ["b.md#c", "e.png"]
    assert slug("`make demo`: what it does") == "make-demo-what-it-does"
    assert PLACEHOLDER.search("@@OUTPUT:prismaquant-ray report run.yaml@@")
    assert {"RayCluster.restore", "ROOT", "start_driver"} <= names_in(ROOT / "tests" / "ray_cluster.py")
    assert {"budget.bpp", "rounding.gptq.damping", "cluster.labels"} <= set(keys(Config))
