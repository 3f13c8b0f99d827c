"""The documentation: its code blocks run, its command lines and specs are read, its links and names exist.

A Python block that cannot run on a CPU in seconds has the comment `<!-- not run: REASON -->` before it.
"""

import ast
import configparser
import json
import re
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nnunetv2
import pandas
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

import nnunet_xattnres
from nnunet_xattnres import cli
from nnunet_xattnres.benchmark.spec import read_spec
from nnunet_xattnres.nnunet.installation import list_trainers
from nnunet_xattnres.nnunet.presets import build_preset
from nnunet_xattnres.routing.recording import RoutingHistory

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]

NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
# Formulas and what is no code at all.
TEXT = "text"
# Commands whose options are not checked.
PLAIN_COMMANDS = ("cp", "mkdir", "pre-commit", "pytest", "python")
COMMAND_IN_SENTENCE = re.compile(r"(nnunet-xattnres|make|pip|pytest|python) |nnUNetv2_")
COMMAND_ENDS = (";", "&&", "||", "|")
FOLDERS = ("nnunet_xattnres", "trainers", "tests", "docs", "specs", "results", "studies")
FILE_NAME = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./*-]*")
OWN_TRAINER = re.compile(r"nnUNetTrainer(?:XAttnRes|NoSkip|Planned)\w*")
# With the value before it, if it has one: +1.21 [+0.32, +2.12]
NUMBER = r"([+-]?\d+\.\d+)"
INTERVAL = re.compile(rf"(?:{NUMBER}(?:\*\*|x)?(?:\s+(?:points|the\s+steps))?\s+)?\[{NUMBER},\s+{NUMBER}\]")
# In a string of the source code: a part that varies.
VARIES = "\0"


@dataclass(frozen=True)
class Block:
    """line: of its first line of code, counted from 0. not_run: the reason, or None."""

    page: Path
    line: int
    language: str
    code: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line + 1}"


@cache
def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def inline(page: Path, kind: str) -> Iterator[Token]:
    """The inline tokens of a kind, in order."""
    for token in tokens(page):
        yield from (child for child in token.children or () if child.type == kind)


def blocks_of(page: Path) -> Iterator[Block]:
    not_run = None
    for token in tokens(page):
        if token.type in ("fence", "code_block"):
            line = token.map[0] + (token.type == "fence")
            yield Block(page, line, token.info.strip(), token.content, not_run)
        mark = NOT_RUN.fullmatch(token.content.strip()) if token.type == "html_block" else None
        not_run = mark and mark[1]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def blocks(*languages: str) -> pytest.MarkDecorator:
    chosen = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=str)


def test_every_block_is_tried() -> None:
    tried = ("python", "bash", "console", "yaml", "json", TEXT)
    assert [str(block) for block in BLOCKS if block.language not in tried] == []


def test_only_python_is_marked_as_not_run() -> None:
    assert [str(block) for block in BLOCKS if block.not_run and block.language != "python"] == []


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that examples read: plans of a small network, and the record of a training."""
    plans, _ = build_preset("msd04")
    configuration = plans["configurations"]["3d_fullres"]
    configuration["patch_size"] = [16, 16, 16]
    configuration["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8, 16, 16]
    (tmp_path / "nnUNetPlans.json").write_text(json.dumps(plans))
    (tmp_path / "fold_0").mkdir()
    sources = {"E2": ["E0", "current"], "D0": ["E0", "E1", "E2", "current"]}
    weights: dict[str, list[float | None]] = {"E2": [0.5, 0.5], "D0": [0.1, 0.2, 0.3, 0.4]}
    RoutingHistory(sources, {0: weights, 1: weights}).write(tmp_path / "fold_0" / "xattnres_routing.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "page", dict.fromkeys(block.page for block in BLOCKS if block.language == "python"), ids=lambda page: page.name
)
@pytest.mark.usefixtures("working_folder")
def test_python_blocks_run(page: Path) -> None:
    namespace: dict[str, Any] = {"__name__": page.stem}
    for block in blocks_of(page):
        if block.language == "python":
            code = compile("\n" * block.line + block.code, str(page), "exec")
            if block.not_run is None:
                exec(code, namespace)


@blocks("bash", "console")
def test_command_lines_are_accepted(block: Block) -> None:
    lines = block.code.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    commands = [command for line in lines for command in commands_in(line)]
    assert commands
    for command in commands:
        check_command(command)


def commands_in(line: str) -> Iterator[list[str]]:
    """The commands of a line of a shell, without what only steers the shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    command: list[str] = []
    for word in [*lexer, ";"]:
        for inner in re.findall(r"\$\((.+?)\)", word):
            yield from commands_in(inner)
        if word not in COMMAND_ENDS:
            command.append(word)
            continue
        while command and (command[0] in ("do", "done", "export") or re.match(r"\w+=", command[0])):
            del command[0]
        if command and command[0] != "for":
            yield command
        command = []


def check_command(command: Sequence[str]) -> None:
    name, *arguments = command
    if name == "nnunet-xattnres":
        parse(cli.main, command)
    elif name.startswith("nnUNetv2_"):
        (entry_point,) = entry_points(group="console_scripts", name=name)
        parse(entry_point.load(), command)
    elif name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {argument for argument in arguments if "=" not in argument} <= set(targets)
    elif name == "pip":
        assert arguments[0] == "install"
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        for extra in re.findall(r"\.\[(\w+)\]", " ".join(arguments)):
            assert extra in setup["options.extras_require"]
    else:
        assert name in PLAIN_COMMANDS
    for argument in arguments:
        check_file_name(argument)


class Parsed(Exception):
    """The arguments are accepted."""


def parse(main: Callable[[], object], command: Sequence[str]) -> None:
    """Call a command until it has parsed its arguments. It exits if it does not accept them."""
    parse_known_args = ArgumentParser.parse_known_args

    def parse_and_stop(parser: ArgumentParser, *arguments: Any) -> None:
        # Some of nnU-Net's commands ignore what they do not know.
        with patch.object(ArgumentParser, "parse_known_args", parse_known_args):
            parser.parse_args(*arguments)
        raise Parsed

    with (
        patch.object(sys, "argv", list(command)),
        patch.object(ArgumentParser, "parse_known_args", parse_and_stop),
        pytest.raises(Parsed),
    ):
        main()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_sentences_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for code in inline(page, "code_inline"):
        if COMMAND_IN_SENTENCE.match(code.content):
            try:
                check_command(shlex.split(code.content))
            except SystemExit:
                # A sentence may name a command without all it needs.
                assert "required" in capsys.readouterr().err, code.content


@blocks("yaml")
def test_specs_are_read(block: Block, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(block.code)
    read_spec(tmp_path / "spec.yaml")


@blocks("json")
def test_json_is_valid(block: Block) -> None:
    json.loads(block.code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page: Path) -> None:
    links = [link.attrs["href"] for link in inline(page, "link_open")]
    links += [picture.attrs["src"] for picture in inline(page, "image")]
    for link in map(str, links):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        # The site has only what is in its folder.
        assert page.parent != DOCS or target.is_relative_to(DOCS), link
        assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> list[str]:
    """Of the headings, as the repository's pages and the site make them."""
    of_page = tokens(page)
    headings = [of_page[i + 1].content for i, token in enumerate(of_page) if token.type == "heading_open"]
    return [re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    for code in inline(page, "code_inline"):
        check_file_name(code.content)


def check_file_name(text: str) -> None:
    if FILE_NAME.fullmatch(text):
        assert any(ROOT.glob(text.rstrip("/"))), text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_trainers_exist(page: Path) -> None:
    trainers = {name for name, _ in list_trainers()}
    # The name of a model's folder continues with two underscores.
    assert {name.partition("__")[0] for name in OWN_TRAINER.findall(page.read_text(encoding="utf-8"))} <= trainers


def test_every_page_is_in_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in PAGES if page.parent == DOCS and f": {page.name}\n" not in navigation] == []


def test_figure_of_the_results_is_that_of_the_report() -> None:
    # The site cannot show a file of another folder.
    figure = "paired_differences.png"
    assert (DOCS / figure).read_bytes() == (ROOT / "results" / "evidence" / figure).read_bytes()


@cache
def numbers_of_reports() -> set[tuple[float, ...]]:
    """(value, low, high) and (low, high) of the reports in results, rounded to one digit and to two.

    Mean differences in points, in both directions, and ratios of steps.
    """
    found: list[tuple[float, ...]] = []
    for path in (ROOT / "results").glob("*/comparisons.csv"):
        for row in pandas.read_csv(path).itertuples():
            intervals = [(row.low, row.high), (row.low_of_trainings, row.high_of_trainings)]
            found += [tuple(100 * value for value in (row.difference, *interval)) for interval in intervals]
            found += [(-value, -high, -low) for value, low, high in found[-2:]]
    for path in (ROOT / "results").glob("*/steps_to_target.csv"):
        found += pandas.read_csv(path)[["ratio", "low", "high"]].itertuples(index=False, name=None)
    rounded = {tuple(round(value, digits) for value in values) for values in found for digits in (1, 2)}
    return rounded | {values[1:] for values in rounded}


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "results.md"], ids=lambda page: page.name)
def test_intervals_are_those_of_a_report(page: Path) -> None:
    found = list(INTERVAL.finditer(page.read_text(encoding="utf-8")))
    assert len(found) > 5
    quoted = {match[0]: tuple(float(value) for value in match.groups() if value) for match in found}
    assert [text for text, values in quoted.items() if values not in numbers_of_reports()] == []


def messages() -> Iterator[str]:
    """The first column of the tables in the page on troubleshooting, without their headings."""
    of_page = tokens(DOCS / "troubleshooting.md")
    for i, token in enumerate(of_page):
        if token.type == "td_open" and of_page[i - 1].type == "tr_open":
            yield (of_page[i + 1].children or [])[0].content


@cache
def strings(package: Path) -> list[str]:
    """All strings in the source code of a package."""
    modules = [ast.parse(file.read_bytes()) for file in package.rglob("*.py")]
    return ["".join(parts(node)) for module in modules for node in ast.walk(module)]


def parts(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.FormattedValue():
            yield VARIES
        case ast.JoinedStr(values=values):
            for value in values:
                yield from parts(value)


@pytest.mark.parametrize("message", list(messages()))
def test_messages_are_those_of_the_code(message: str) -> None:
    pattern = re.compile(".*".join(map(re.escape, message.split("..."))), re.DOTALL)
    packages = (Path(nnunet_xattnres.__path__[0]), Path(nnunetv2.__path__[0]))
    assert any(pattern.search(text) for package in packages for text in strings(package))
