"""Claims about the structure of the product, read from its source."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from prismaquant_ray import records
from prismaquant_ray.formats import FormatName

ROOT = Path(__file__).parents[1]
FILES = [path for package in ("prismaquant_ray", "actors", "jobs") for path in sorted((ROOT / package).rglob("*.py"))]
LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 400, 60
#: What every command defines: see jobs/command_line.py.
COMMANDS = {"run", "render"}
#: Where people are talked to.
TALKING = ("jobs/command_line.py", "jobs/commands/")
OPEN_MAPPINGS = ("dict[str, Any]", "Mapping[str, Any]")
#: Mappings whose keys are not ours to list: in functions that other packages call, in fields and methods.
THIRD_PARTY_JSON = {
    "prismaquant_ray.compressed.quantized_modules.Coded.group": "a config group as compressed-tensors defines it",
    "prismaquant_ray.compressed.quantized_modules.QuantizedModule.group": "a config group",
    "prismaquant_ray.formats.base.Format.modelopt": "attributes of quantizers as ModelOpt defines them",
    "prismaquant_ray.formats.base.Format.scheme": "QuantizationArgs as compressed-tensors defines them",
    "prismaquant_ray.model.expert_stacks.expert_stacks": "config.json",
    "prismaquant_ray.source.folded.FoldedSource.config": "config.json",
    "prismaquant_ray.source.protocol.TensorSource.config": "config.json",
    "prismaquant_ray.config.checked": "settings as YAML has them, before they are checked",
    "prismaquant_ray.serialization.to_json": "any record as JSON",
    "prismaquant_ray.serialization.from_json": "JSON that may be no record",
    "prismaquant_ray.repository.manifest.claim": "a manifest, which names whatever a repository has",
    "prismaquant_ray.repository.manifest.as_json": "a manifest",
    "prismaquant_ray.repository.routing.vllm_route": "quantization_config as compressed-tensors defines it",
    "prismaquant_ray.repository.routing.is_ignored": "quantization_config",
    "prismaquant_ray.repository.writer.write_repository": "a manifest",
    "prismaquant_ray.source.checkpoint.read_config": "config.json",
    "prismaquant_ray.source.checkpoint.read_json": "an index",
    "prismaquant_ray.source.config_json.absurd_size": "config.json",
    "prismaquant_ray.parsing.as_object": "any JSON",
    "prismaquant_ray.parsing.parse_object": "any JSON",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree(path)))


def module_of(path: Path) -> str:
    return name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def public(path: Path) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes of a module that have no underscore."""
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def public_members(owner: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Annotated fields and methods of a class that have no underscore, with their types."""
    for node in owner.body:
        if isinstance(node, ast.AnnAssign) and not ast.unparse(node.target).startswith("_"):
            yield ast.unparse(node.target), ast.unparse(node.annotation)
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, ast.unparse(node.args) + ast.unparse(node.returns or ast.Constant(None))


def literals(path: Path) -> Iterator[str]:
    """Text in code, formatted or not; docstrings are not code."""
    prose = {id(node.value) for node in nodes(path) if isinstance(node, ast.Expr)}
    for node in nodes(path):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def test_a_public_name_is_defined_once() -> None:
    homes = defaultdict(list)
    for path in FILES:
        for node in public(path):
            if not (node.name in COMMANDS and path.parent.name == "commands"):
                homes[node.name].append(name_of(path))
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_files_and_functions_are_short() -> None:
    assert [name_of(path) for path in FILES if path.read_text().count("\n") > LINES_OF_A_FILE] == []
    functions = [
        (name_of(path), node.name, (node.end_lineno or 0) - node.lineno + 1)
        for path in FILES
        for node in nodes(path)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert len(functions) > 1000
    assert [entry for entry in functions if entry[2] > LINES_OF_A_FUNCTION] == []


def test_only_commands_talk_to_people() -> None:
    found = []
    for path in FILES:
        if name_of(path).startswith(TALKING):
            continue
        for node in nodes(path):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            prints = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            if prints or {name.partition(".")[0] for name in imported} & {"click", "rich"}:
                found.append(f"{name_of(path)}:{node.lineno}")
    assert found == []


def test_a_format_is_known_by_name_only_to_its_own_file() -> None:
    """BF16 is what is not quantized; the configuration has a default; MX names its activations by its weights.

    A baseline is what vendors ship, which names its formats.
    """
    names = ("config.py", "compressed/activations.py", "allocation/baselines.py")
    expected = {f"prismaquant_ray/{name}" for name in names}
    others = {name for name in FormatName.__members__ if name != "BF16"}
    found = {
        name_of(path) for path in FILES for node in nodes(path)
        if isinstance(node, ast.Attribute) and node.attr in others and ast.unparse(node.value) == "FormatName"
    }  # fmt: skip
    assert {name for name in found if not name.startswith("prismaquant_ray/formats/")} == expected


def test_objects_keep_their_state_in_attributes() -> None:
    found = [
        f"{name_of(path)}:{node.lineno}" for path in FILES for node in nodes(path)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "self.__dict__"
    ]  # fmt: skip
    assert found == []


def test_packages_exchange_records_rather_than_mappings() -> None:
    """What crosses a package has fields; exceptions are mappings that somebody else defines."""
    imported = defaultdict(set)
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    imported[f"{node.module}.{alias.name}"].add(path.parent)
    found = {
        f"{module_of(path)}.{node.name}": ast.unparse(node.args) + ast.unparse(node.returns or ast.Constant(None))
        for path in FILES
        for node in public(path)
        if isinstance(node, ast.FunctionDef)
    }
    crossing = {
        name
        for name, signature in found.items()
        if any(mapping in signature for mapping in OPEN_MAPPINGS)
        and imported[name] - {(ROOT / name.replace(".", "/")).parent.parent}
    }
    members = {
        f"{module_of(path)}.{owner.name}.{name}": signature
        for path in FILES
        for owner in public(path)
        if isinstance(owner, ast.ClassDef)
        for name, signature in public_members(owner)
    }
    crossing |= {name for name, signature in members.items() if any(mapping in signature for mapping in OPEN_MAPPINGS)}
    assert crossing == set(THIRD_PARTY_JSON)


def test_json_and_yaml_are_read_in_one_place() -> None:
    """Where bytes, values and depth are bounded; libraries that read files of their own are called behind it."""
    reading = {"json.load", "json.loads", "yaml.load", "yaml.safe_load", "pydantic_core.from_json"}
    found = {
        name_of(path) for path in FILES for node in nodes(path)
        if isinstance(node, ast.Attribute) and (ast.unparse(node) in reading or node.attr == "validate_json")
    }  # fmt: skip
    assert found == {"prismaquant_ray/parsing.py"}


def test_keys_of_the_run_store_are_written_in_one_place() -> None:
    keys = {value for name, value in vars(records).items() if name.isupper() and isinstance(value, str)}
    assert {"run.json", "plans/", "evaluations"} <= keys
    folders = tuple(key for key in keys if key.endswith("/"))
    elsewhere = {path: literals(path) for path in FILES if path != Path(records.__file__)}
    found = [
        (name_of(path), text) for path, texts in elsewhere.items() for text in texts
        if text in keys or text.startswith(folders)
    ]  # fmt: skip
    assert found == []
