"""What the README says of commands, options and files is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.bench.__main__ import parser as bench_parser
from tools.bench.peers.recipes import PEERS
from tools.cli import COMMANDS
from tools.options import OPTIONS, Option, mount_parser

CHECKOUT = Path(__file__).resolve().parent.parent
README = (CHECKOUT / "README.md").read_text("utf-8")
BEGIN = "<!-- options: tests/test_03_readme.py holds this table against tools/options.py -->\n"
END = "<!-- end of options -->"


def row(option: Option) -> str:
    """Return the table's row for *option*, as the README has it."""
    value = "" if option.metavar is None else f" {option.metavar}".replace("|", "\\|")
    again = "; may be given several times" if option.repeatable else ""
    return f"| `--{option.name}{value}` | {option.help}{again} | {option.default or 'off'} |"


def options_table() -> str:
    heads = ["| option | what it does | default |", "|---|---|---|"]
    return "\n".join([*heads, *map(row, OPTIONS)]) + "\n"


def test_the_table_of_options_is_that_of_the_command() -> None:
    """On failure, put what is printed between the two comments."""
    found = README.partition(BEGIN)[2].partition(END)[0]
    assert found == options_table(), f"the README's table should be:\n{options_table()}"


def test_every_option_of_the_command_is_in_the_table() -> None:
    """The table above is made from OPTIONS; here the parser itself is asked."""
    documented = set(re.findall(r"^\| `(--[a-z-]+)", README, re.MULTILINE)) | {"--config"}
    strings = {string for action in mount_parser()._actions for string in action.option_strings}
    of_the_parser = {s for s in strings if s.startswith("--") and not s.startswith("--no-")} - {"--help"}
    assert documented == of_the_parser


def test_the_table_of_commands_is_that_of_the_command() -> None:
    documented = re.findall(r"^\| `sluice ([a-z]+)", README, re.MULTILINE)
    assert documented == list(COMMANDS)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_a_link_leads_to_a_file(path: str) -> None:
    assert (CHECKOUT / path).exists()


def test_the_scripts_that_are_named_are_there() -> None:
    for script in set(re.findall(r"^bash (\S+)", README, re.MULTILINE)):
        assert (CHECKOUT / script).is_file()
    assert "bash tools/demo" in README
    assert "bash tests/run" in README


def test_the_options_in_the_text_exist() -> None:
    prose = README.partition(BEGIN)[0] + README.partition(END)[2].partition("## Beside others")[0]
    known = {f"--{option.name}" for option in OPTIONS}
    of_commands = {"--config", "--json", "--recursive", "--lazy", "--keep"}
    of_commands |= {"--seconds", "--plot", "--size", "--latency", "--bandwidth", "--generate"}
    of_commands |= {string for action in bench_parser()._actions for string in action.option_strings}
    of_commands |= {"--from-list", "--tier", "--no-fetch", "--list", "--repair"}
    elsewhere = of_commands | {"--data", "--save-to"}  # Of a training script.
    assert set(re.findall(r"--[a-z][a-z-]+", prose)) <= known | elsewhere


def test_the_samplers_that_are_named_are_those_that_can_be_told() -> None:
    from cache.policy.order.samplers import FAMILIES

    section = README.partition("## The order of samples")[2].partition("\n## ")[0]
    named = {name for name in FAMILIES if not name.startswith("webdataset")}
    assert all(f"`{name}`" in section or f"sampler={name} " in section for name in named)


def test_the_notes_on_the_benchmarks_name_every_peer() -> None:
    notes = (CHECKOUT / "tools/bench/README.md").read_text("utf-8")
    assert [peer for peer in PEERS if not re.search(rf"\b{peer}\b", notes)] == []
