"""Benchmarks of several sides: rounds, peers that fail, how peers are mounted and installed."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import pytest

from cache.errors import UsageError
from tools import cli, svg
from tools.bench import __main__ as command
from tools.bench import costs, lakes, report
from tools.bench.contest import NATIVE, OURS, Outcome, Side, Task, contest
from tools.bench.figures import Figure, MeasurementFailed, SideCost, Target, machine
from tools.bench.larger import over_budget
from tools.bench.peers import install
from tools.bench.peers.recipes import (
    PEERS,
    NotApplicable,
    Recipe,
    Request,
    juicefs_has_sent,
    rclone_has_sent,
)
from tools.bench.peers.side import mounted_peer, unmount
from tools.bench.settings import Settings

VENV = Path(sys.prefix)  # The tests' own packages have rclone and weed.
TASK = Task("t", "a task", "files/s", 10, 2_000_000_000)
needs_fuse = pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="needs /dev/fuse")


class FakeSide:
    """A side that takes *took_s*; a peer fails in the round *fails_in*."""

    def __init__(
        self, name: str, kind: Literal["ours", "native", "peer"], took_s: float, fails_in: int = -1
    ) -> None:
        self.name, self.kind, self.took_s, self.fails_in = name, kind, took_s, fails_in
        self.directory = Path("/nowhere")

    def pids(self) -> Sequence[int]:
        return [] if self.kind == "native" else [os.getpid()]

    def cache_bytes(self) -> int:
        return 0

    def forget(self) -> None: ...

    def settle(self) -> None: ...

    def work(self, number: int) -> float:
        if number == self.fails_in:
            raise MeasurementFailed("it broke\nin two lines")
        return self.took_s


def held(
    *peers: FakeSide, rounds: int = 3, tmp_path: Path
) -> tuple[Outcome, list[str], list[str], list[str]]:
    """Return the outcome, the order of work, the sides left, and the complaints."""
    calls: list[str] = []
    fakes = [FakeSide(OURS, "ours", 1.0), FakeSide(NATIVE, "native", 0.5), *peers]
    by_name = {fake.name: fake for fake in fakes}
    settings, sides = Settings(tmp_path, rounds=rounds), list[Side](fakes)

    def work(side: Side, number: int) -> float:
        calls.append(side.name)
        return by_name[side.name].work(number)

    outcome = contest(settings, TASK, sides, work)
    return outcome, calls, [side.name for side in sides], settings.complaints


def test_who_begins_changes_from_round_to_round(tmp_path: Path) -> None:
    outcome, calls, _, _ = held(FakeSide("p", "peer", 2.0), tmp_path=tmp_path)
    assert calls == [OURS, NATIVE, "p", NATIVE, "p", OURS, "p", OURS, NATIVE]
    assert outcome.values == {OURS: [10.0] * 3, NATIVE: [20.0] * 3, "p": [5.0] * 3}


def test_a_peer_that_fails_is_a_line_and_the_rest_goes_on(tmp_path: Path) -> None:
    bad = FakeSide("bad", "peer", 1.0, fails_in=1)
    outcome, _, left, complaints = held(bad, FakeSide("good", "peer", 2.0), tmp_path=tmp_path)
    assert complaints == ["t: bad failed: it broke in two lines"]
    assert left == [OURS, NATIVE, "good"]
    figure = outcome.figure(Target(at_least=1), Target(at_least=2))
    assert figure.peers == {"good": [5.0] * 3}
    assert (figure.is_target_met, figure.is_peer_met) == (False, True)


@pytest.mark.parametrize(("kind", "name"), [("ours", OURS), ("native", NATIVE)])
def test_ours_or_the_native_one_failing_ends_it(
    kind: Literal["ours", "native"], name: str, tmp_path: Path
) -> None:
    sides: list[Side] = [FakeSide(name, kind, 1.0, fails_in=0)]
    with pytest.raises(MeasurementFailed):
        contest(Settings(tmp_path), TASK, sides, lambda side, number: side.work(number))  # type: ignore[attr-defined]


def test_the_best_peer_is_the_fastest_by_rate_and_the_shortest_by_time() -> None:
    peers = {"slow": [2.0, 2.0], "fast": [4.0, 5.0]}
    rate = Figure("f", "w", "MiB/s", [8.0, 10.0], None, peers=peers, over_peer=Target(at_least=2))
    assert (rate.best_peer, rate.peer_ratio, rate.is_met) == ("fast", 2.0, True)
    time_s = Figure("f", "w", "s", [8.0, 10.0], None, peers=peers)
    assert (time_s.best_peer, time_s.peer_ratio) == ("slow", 4.5)
    assert Figure("f", "w", "s", [1.0], None, over_peer=Target(at_least=2)).is_peer_met is None


def test_cost_is_of_the_daemons_and_by_the_gigabyte(tmp_path: Path) -> None:
    outcome, *_ = held(tmp_path=tmp_path)
    cost = outcome.figure().costs[OURS]
    assert cost.cpu_s_per_gb == pytest.approx(cost.cpu_s / 2)
    assert cost.rss_bytes >= cost.pss_bytes > 1 << 20
    assert NATIVE not in outcome.figure().costs


def test_a_meter_sees_what_this_process_spends() -> None:
    meter = costs.Meter([os.getpid()])
    before_s = costs.cpu_s(os.getpid())
    while costs.cpu_s(os.getpid()) < before_s + 0.1:
        pass
    assert 0.09 < meter.cost().cpu_s < 60
    assert costs.cpu_s(2**22 + 1) == 0
    assert os.getpid() in costs.with_descendants([os.getppid()])


def test_peers_past_their_budget_are_not_compared(tmp_path: Path) -> None:
    settings = Settings(tmp_path)
    sides: list[Side] = [FakeSide("a", "peer", 1), FakeSide("b", "peer", 1), FakeSide(OURS, "ours", 1)]
    assert over_budget(settings, sides, {"a": 130, "b": 110, OURS: 500}, 100) == ["a"]
    assert settings.complaints == [
        "larger: a is not compared: its cache took 130 B of the 100 B it was given"
    ]


# --- The report --------------------------------------------------------------------------------


FIGURES = [
    Figure(
        "one", "first <thing>", "MiB/s", [9.0, 10.0], Target(at_least=0.9), "ext4", [10.0, 10.0],
        {"note": 1}, {"p & q": [5.0, 5.0]}, Target(at_least=3), {"sluice": SideCost(0.5, 1.0, 10**8, 10**7)},
        "the goal",
    ),
    Figure("two", "second", "bytes", [7.0], Target(at_most=5.0)),
]  # fmt: skip


def test_the_table_shows_peers_costs_spread_and_verdicts() -> None:
    shown = report.text(FIGURES, ["s3fs is left out: why"])
    for part in (
        "0.95     >= 0.9  met", "least to most: 9 to 10", "p & q: 5 (5 to 5)", "target >= 3  MISSED",
        "0.50 CPU s/GB, 1.00 CPU s, RSS 100 MB, PSS 10 MB", "MISSED", "s3fs is left out: why",
    ):  # fmt: skip
        assert part in shown
    last = shown.splitlines()[-1]
    assert re.fullmatch(r"the goal +0.95 +>= 0.9 +met +1.90 \(p & q\) +>= 3 +MISSED", last)


def test_a_goal_without_peers_says_that_they_were_not_measured() -> None:
    row = report.goal_row(
        Figure("f", "w", "s", [2.0], Target(at_most=3), over_peer=Target(at_least=2), goal="g")
    )
    assert row == ["g", "2", "<= 3", "met", "-", ">= 2", ""]


def test_the_page_has_a_drawing_for_each_figure_and_is_well_formed(tmp_path: Path) -> None:
    page = report.page(FIGURES, ["a < b"], machine(tmp_path), {"x: weed": "weed mount <d>"})
    drawings = [ElementTree.fromstring(drawn) for drawn in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert [len(drawing.findall("rect")) for drawing in drawings] == [3, 1]
    assert "a &lt; b" in page and "first &lt;thing&gt;" in page
    assert "weed mount &lt;d&gt;" in page
    assert "http" not in page


def test_bars_are_as_long_as_their_medians() -> None:
    drawing = ElementTree.fromstring(svg.bars("t", {"a": [1, 2, 3], "b": [4, 4]}, str))
    widths = [float(bar.get("width", "")) for bar in drawing.findall("rect")]
    assert widths[1] == pytest.approx(2 * widths[0])
    assert ElementTree.fromstring(svg.bars("t", {"a": [0.0]}, str)) is not None


def test_results_are_json(tmp_path: Path) -> None:
    told = json.loads(json.dumps([figure.to_json() for figure in FIGURES], allow_nan=False))
    assert (told[0]["best_peer"], told[0]["peer_ratio"], told[0]["met"]) == ("p & q", 1.9, False)
    assert (told[1]["ratio"], told[1]["peer_ratio"]) == (None, None)
    assert machine(tmp_path)["file_system"] != "unknown"


# --- Bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rounds=0"], "--rounds 0: must be a whole number from 1 to 1000"),
        (["--rounds=2.5"], "--rounds 2.5: must be a whole number"),
        (["--scale=-1"], "--scale -1: must be a number above 0"),
        (["--scale=nan"], "--scale nan: must be"),
        (["--scale=1e9"], "--scale 1e9: must be"),
        (["--only=open"], "--only open: no such benchmark; did you mean opens?"),
        (["--peers=juicfs"], "--peers juicfs: no such peer; did you mean juicefs?"),
        (["--peers="], "must name some of"),
        (["--workdir=/nonexistent"], "--workdir /nonexistent: must be a directory"),
        (["--json=/nonexistent/a"], "--json /nonexistent/a: its directory does not exist"),
        (["--html=/"], "--html /: is a directory"),
        (["--mount-options='a"], "--mount-options 'a: No closing quotation"),
        (["--peer"], "not an option of `sluice bench`; did you mean --peers"),
    ],
)
def test_bad_input_is_told_in_one_line_before_anything_is_done(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *words]) == 2
    complaint = capsys.readouterr().err
    assert said in complaint
    assert complaint.count("\n") == 1


def test_the_benchmarks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(command.MODULES)
    assert sum(line.endswith("(--peers)") for line in lines) == len(command.CONTESTS)
    assert command.parser().parse_args(["--peers"]).peers.split(",") == list(PEERS)
    with pytest.raises(UsageError):
        command.check(command.parser().parse_args(["--peers=x"]))


# --- The peers' command lines ------------------------------------------------------------------


DIRECT = lakes.Endpoint("http://127.0.0.1:1", "key", "secret", "us-east-1", "127.0.0.1:3.4")
SLOW = lakes.Endpoint("http://127.0.0.1:2", "key", "secret", "us-east-1")


def recipe(
    name: str, *, slow: bool = False, writable: bool = False, delay_s: int = 0, tight: bool = False
) -> Recipe:
    endpoint = SLOW if slow else DIRECT
    home = Path("/h") / name
    return PEERS[name](Request(Path("/programs"), home, DIRECT, endpoint, 1 << 30, writable, delay_s, tight))


@pytest.mark.parametrize("name", PEERS)
def test_each_peer_gets_the_same_budget_directory_and_lake(name: str) -> None:
    words = " ".join([*recipe(name).mount, *recipe(name).environment.values()])
    assert f"/h/{name}/data" in words and f"/h/{name}/cache" in words
    assert "127.0.0.1:3.4" in words if name == "weed" else DIRECT.url in words
    budget = {"juicefs": "1024M", "rclone": f"{1 << 30}B", "weed": "-cacheCapacityMB=1024"}
    assert budget.get(name.partition("-")[0], "") in words


@pytest.mark.parametrize("name", sorted(set(PEERS) - {"weed"}))
def test_a_slow_lake_is_read_through_its_proxy_and_filled_directly(name: str) -> None:
    made = recipe(name, slow=True)
    words = " ".join([*made.mount, *made.environment.values()])
    assert SLOW.url in words and DIRECT.url not in words
    assert DIRECT.url in " ".join(made.load) if made.load else name in ("rclone", "s3fs")


def test_weed_can_not_be_slowed_down_by_a_proxy_of_s3() -> None:
    with pytest.raises(NotApplicable, match="gRPC"):
        recipe("weed", slow=True)


def test_juicefs_is_measured_with_both_evictions_and_writes_back() -> None:
    assert "--cache-eviction=2-random" in recipe("juicefs").mount
    assert "--cache-eviction=none" in recipe("juicefs-none").mount
    assert "--writeback" not in recipe("juicefs").mount
    written = recipe("juicefs", writable=True, delay_s=600).mount
    assert "--writeback" in written and "--upload-delay=600s" in written
    assert "--writeback" not in recipe("juicefs", writable=True).load


def test_rclone_sends_soon_or_late_and_never_never() -> None:
    assert "--vfs-write-back=100ms" in recipe("rclone", writable=True).mount
    assert "--vfs-write-back=600s" in recipe("rclone", writable=True, delay_s=600).mount
    assert "--vfs-cache-mode=full" in recipe("rclone").mount


def test_a_tight_budget_of_s3fs_is_a_file_system_that_is_unmounted_in_the_end() -> None:
    tight = recipe("s3fs", tight=True)
    assert [command[0] for command in tight.prepare] == ["truncate", "mkfs.ext4", "mkdir", "mount"]
    assert tight.clean_up == [["umount", "/h/s3fs/cache"]]
    assert not recipe("s3fs").prepare and not recipe("s3fs").clean_up


def test_no_secret_stands_on_the_command_line_of_s3fs() -> None:
    assert "secret" not in " ".join(recipe("s3fs").mount)
    assert recipe("s3fs").files == {"passwd": "key:secret\n"}


def test_what_peers_say_of_unsent_files_is_understood() -> None:
    stats = "juicefs_uptime 3\njuicefs_staging_block_bytes {}\njuicefs_staging_blocks {}\n"
    assert juicefs_has_sent(stats.format(0, 0))
    assert not juicefs_has_sent(stats.format(4096, 1))
    told = '{{"diskCache": {{"uploadsInProgress": {}, "uploadsQueued": {}}}}}'
    assert rclone_has_sent(told.format(0, 0))
    assert not rclone_has_sent(told.format(1, 0)) and not rclone_has_sent(told.format(0, 1))
    with pytest.raises(ValueError):
        rclone_has_sent("connection refused")


# --- Installation ------------------------------------------------------------------------------


def test_peers_are_installed_once_and_those_that_can_not_be_are_told(tmp_path: Path) -> None:
    ran: list[list[str]] = []
    complaints: list[str] = []

    def runner(words: list[str]) -> None:
        ran.append(words)
        if words[-1].startswith("rclone"):
            raise RuntimeError("no network")
        (tmp_path / "bin").mkdir(exist_ok=True)
        made = "python" if "venv" in words else "juicefs"
        (tmp_path / "bin" / made).touch()

    peers = ["juicefs", "juicefs-none", "rclone"]
    assert install.install(peers, tmp_path, complaints.append, runner) == ["juicefs", "juicefs-none"]
    assert complaints == ["rclone is left out: no network"]
    assert [words[2] for words in ran] == ["venv", "pip", "pip"]
    ran.clear()
    install.install(["juicefs"], tmp_path, complaints.append, runner)
    assert not ran


def test_s3fs_without_root_is_told_how_to_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(tmp_path))
    complaints: list[str] = []
    assert install.install(["s3fs"], tmp_path, complaints.append, pytest.fail) == []
    assert complaints == [
        "s3fs is left out: s3fs is not installed; get it with: apt-get install s3fs (needs root)"
    ]


def test_an_installer_that_fails_is_told_in_one_line() -> None:
    with pytest.raises(RuntimeError, match=r"^`python\S* -c` failed: last$"):
        install.run([sys.executable, "-c", "raise SystemExit('first\\nlast')"])
    with pytest.raises(RuntimeError, match="No such file"):
        install.run(["/nonexistent/pip", "install"])


def test_every_peer_has_a_program_that_is_known() -> None:
    assert set(install.PROGRAM_OF) == set(PEERS)
    assert set(install.PROGRAM_OF.values()) == {*install.PACKAGES, "s3fs"}


# --- Real mounts of those peers that the tests' packages bring along ---------------------------


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[lakes.Endpoint]:
    with lakes.seaweed(tmp_path_factory.mktemp("server")) as found:
        lakes.fill(found, {"a/one": 5000})
        yield found


@needs_fuse
@pytest.mark.parametrize("name", ["rclone", "weed"])
def test_a_peer_reads_writes_forgets_and_leaves_nothing(
    name: str, endpoint: lakes.Endpoint, tmp_path: Path
) -> None:
    home = tmp_path / ("deep" * 30)  # Longer than the path of a socket may be.
    home.mkdir()
    request = Request(VENV, home, endpoint, endpoint, 1 << 26, writable=True)
    with mounted_peer(name, request, None) as side:
        assert (side.directory / "a/one").read_bytes() == lakes.body("a/one", 5000)
        (side.directory / f"{name}.new").write_bytes(b"new")
        side.settle()
        first = side.pids()
        assert side.cache_bytes() >= 0
        side.forget()
        assert set(first).isdisjoint(side.pids())
        assert (side.directory / "a/one").read_bytes() == lakes.body("a/one", 5000)
        last = [*first, *side.pids()]
    assert not os.path.ismount(home / "data")
    assert not [pid for pid in last if os.path.exists(f"/proc/{pid}")]


@needs_fuse
def test_a_peer_whose_daemon_was_killed_is_unmounted_all_the_same(
    endpoint: lakes.Endpoint, tmp_path: Path
) -> None:
    request = Request(VENV, tmp_path, endpoint, endpoint, 1 << 26, writable=False)
    with mounted_peer("rclone", request, None) as side:
        os.kill(side.pids()[0], 9)
        with pytest.raises(MeasurementFailed):
            side.settle()
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


def test_a_peer_that_does_not_mount_says_why(tmp_path: Path) -> None:
    nobody = lakes.Endpoint("http://127.0.0.1:1", "a", "b", "us-east-1", "127.0.0.1:1.1")
    bad = Request(VENV, tmp_path, nobody, nobody, -1, writable=False)  # A budget that rclone refuses.
    with pytest.raises(MeasurementFailed, match="ended with status"), mounted_peer("rclone", bad, None):
        pass
    unmount(tmp_path / "data")
