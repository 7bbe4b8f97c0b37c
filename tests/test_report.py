from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from msn_dist.config import RunConfig
from msn_dist.errors import InputError
from msn_dist.strict_yaml import parse
from msn_dist.training.figures import Line, count, line_chart, percent
from msn_dist.training.report import write_report
from msn_dist.training.run_directory import RunDirectory

HEALTH = {
    "used_share": 0.5,
    "window_used_share": 0.4,
    "entropy_ratio": 0.9,
    "kl_to_uniform": 1.1,
    "top1pct_share": 0.07,
    "dead_slots": 30,
    "owner_load_max_over_mean": 1.02,
}
METRICS = {"auc": 0.7321, "gauc": None, "qauc": 0.64, "logloss": 0.5519, "ne": 0.89, "calibration": 1.01, "rows": 9}
LAYER_USAGE = {
    "hits_histogram": {"bin_edges": [0, 1, 2, 4], "slots": [30, 20, 14]},
    "hits_per_owner": [30, 34],
    "top_slots": [3],
    "rank_curve": {"share_of_slots": [0, 0.5, 1], "share_of_hits": [0, 0.8, 1]},
}
SUMMARY = {
    "name": "demo",
    "seed": 7,
    "world_size": 2,
    "device": "cpu",
    "steps": 40,
    "best_step": 30,
    "epochs": 1,
    "seconds": 65.2,
    "examples_per_second": 31_234.5,
    "git_commit": "0123456789abcdef0123456789abcdef01234567",
    "versions": {"python": "3.11.7", "torch": "2.13.0+cpu"},
    "parameters": {"total": 9_312_771, "activated": 1_204_311},
    "valid": METRICS,
    "test": METRICS | {"auc": 0.7205},
    "memory": {"slots": 4096, "used_share": 0.976},
    "bytes_sent": {"forward": {"hits": 3 * 2**20}, "backward": {"hits_gradient": 2**20}},
}


class Page(HTMLParser):
    """What a browser would load and show: well-formed tags, addresses and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def make_run(path: Path, *, steps: int = 0, memory: bool = True, evaluations: bool = False) -> RunDirectory:
    tree = {"name": "demo", "seed": 7, "data": {"path": "<data>"}, "model": {"backbone": "dlrm"}}
    run = RunDirectory.create(parse(RunConfig, tree | ({"memory": {}} if memory else {}), "test"), path)
    with open(run.path / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            record = {"kind": "train", "step": step, "epoch": 0, "loss": 0.5 + 0.1 / step, "seconds": 1.5 * step}
            record |= {"examples_per_second": 1234.0, "learning_rate": 1e-3}
            if memory:
                record["memory"] = {"layer1": HEALTH, "layer3": HEALTH}
            file.write(json.dumps(record) + "\n")
            if evaluations:
                metrics = {"long_view": METRICS, "like": METRICS}
                record = {"kind": "eval", "split": "valid", "step": step, "epoch": 0, "metrics": metrics}
                file.write(json.dumps(record) + "\n")
    return run


def test_finished_run_shows_every_part_and_loads_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=40, evaluations=True)
    run.write_plan({}, "memory.values  row_wise <2 ranks>")
    run.write_memory_usage({"layer1": LAYER_USAGE, "layer3": LAYER_USAGE})
    run.write_summary(SUMMARY)
    assert write_report(tmp_path) == tmp_path / "report.html"

    page = Page(tmp_path / "report.html")
    assert page.open == []
    assert all(address.startswith("#") for address in page.addresses)
    assert not re.search(r"https?:|url\((?!#)|@import|<script|<link", page.source)
    quality, training, health, usage, speed = 2, 2, 6, 4, 1
    assert page.tags.count("svg") == quality + training + health + usage + speed
    for words in (
        "finished",
        "40 steps in 0:01:05 on 2 ranks (cpu), seed 7; results of step 30, the best on valid",
        "Test AUC 0.7205 valid 0.7321",
        "Test GAUC - valid -",
        "31.2k on 2 ranks",
        "9.31M 1.2M active per row",
        "4.1k 97.6% used",
        "layer1 50% layer3 50%",
        "forward: hits 3 MiB 75%",
        "memory.values row_wise <2 ranks>",
        "0123456789ab",
        "2.13.0+cpu",
        "sub_keys: 256",
        "path: <data>",
    ):
        assert words in page.text
    assert "not finished" not in page.text


def test_every_color_of_a_figure_follows_the_theme(tmp_path: Path) -> None:
    svg = line_chart("title", "how", [Line(str(n), [0, 1], [n, n]) for n in range(12)], diagonal=True).svg
    assert not re.search(r"#[0-9a-f]{6}", svg)
    assert {f"var(--series-{n})" for n in range(10)} <= set(re.findall(r"var\([^)]*\)", svg))


def test_interrupted_run_says_so_and_shows_the_latest_numbers(tmp_path: Path) -> None:
    make_run(tmp_path, steps=3, evaluations=True)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # killed while it wrote
    page = Page(write_report(tmp_path))
    assert "not finished" in page.text and "There is no summary.json yet" in page.text
    assert "3 steps in 0:00:04 so far" in page.text
    assert "Test AUC - valid 0.7321" in page.text
    assert "valid like 0.7321" in page.text
    assert "this one has not come to it" in page.text


def test_run_without_any_record_has_honest_empty_states(tmp_path: Path) -> None:
    make_run(tmp_path)
    page = Page(write_report(tmp_path))
    assert "no step recorded yet" in page.text
    assert "No evaluation has been recorded yet." in page.text
    assert "No memory statistics have been recorded yet." in page.text
    assert page.tags.count("svg") == 0


def test_one_step_of_a_model_without_memory_on_one_rank(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=1, memory=False)
    summary = {key: value for key, value in SUMMARY.items() if key != "memory"}
    run.write_summary(summary | {"world_size": 1, "steps": 1, "best_step": 1, "bytes_sent": {}, "git_commit": None})
    page = Page(write_report(tmp_path))
    assert "1 step in 0:01:05 on 1 rank (cpu)" in page.text
    assert "This model carries no memory." in page.text
    assert "none: one rank holds the whole model" in page.text
    assert page.tags.count("svg") == 3  # loss, learning rate, throughput


def test_long_runs_are_thinned_and_gaps_stay_gaps() -> None:
    steps = list(range(100_000))
    values = [float(step) for step in steps]
    whole = line_chart("title", "how", [Line("loss", steps, values)])
    gap = line_chart("title", "how", [Line("loss", steps, [*values[:40_000], *[None] * 20_000, *values[60_000:]])])
    assert len(whole.svg) < 30_000
    assert whole.legend == [("loss", "1e+05", "--series-0")]

    def pieces(svg: str) -> int:
        curve = re.search(r'<path d="([^"]*)"[^>]*var\(--series-0\)', svg)
        return curve[1].count("M")

    assert (pieces(whole.svg), pieces(gap.svg)) == (1, 2)


def test_a_thinned_curve_begins_and_ends_where_it_does() -> None:
    few, ever = [step / 1e6 for step in range(1000)], [step / 1000 for step in range(1000)]

    def ends(x: list[float], y: list[float]) -> tuple[str, str]:
        svg = line_chart("title", "how", [Line("hits", x, y)], bottom=0, top_at_least=1.1).svg
        numbers = re.search(r'<path d="M ([^"]*)"[^>]*var\(--series-0\)', svg)[1].split("L")
        return numbers[0].strip(), numbers[-1].strip()

    assert ends([*few, 1.0], [*ever, 1.0]) == ends([0.0, 1.0], [0.0, 1.0])


def test_a_curve_without_a_finite_value_has_no_last_value() -> None:
    assert line_chart("title", "how", [Line("loss", [1, 2], [None, None])]).legend == [("loss", "-", "--series-0")]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1234, "1.23k"), (999_700, "1M"), (65_536, "65.5k"), (2**36, "68.7G")]
)
def test_counts_have_three_digits(value: int, text: str) -> None:
    assert count(value) == text


def test_percent_drops_a_useless_zero() -> None:
    assert [percent(share) for share in (0.5, 0.841, 1.0)] == ["50%", "84.1%", "100%"]


def test_report_of_something_else_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run directory"):
        write_report(tmp_path / "missing")


def test_report_of_a_broken_file_names_it_and_its_line(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=2)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(InputError, match=r"summary\.json: is not valid JSON"):
        write_report(run.path)
    (tmp_path / "summary.json").unlink()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write("[1, 2]\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 3: expected a JSON object, found list"):
        write_report(run.path)
