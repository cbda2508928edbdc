"""The page tells what the files of a run directory tell: no more, nothing broken, no other file."""

import base64
import html
import html.parser
import json
import os
import re
import statistics
import sys
import xml.etree.ElementTree

import pytest

from lohp_jax.evaluation.plots import _lines_by_gradients
from lohp_jax.evaluation.report import write_report
from lohp_jax.evaluation.standings import significant, standings

ACCURACY = {"lohp": 0.95, "teacher_adam": 0.97, "ridge": 0.91, "cloning": 0.93}
OBJECTIVE = {"lohp": 0.012, "teacher_adam": 0.008, "ridge": 1.5, "cloning": 0.02}
KINDS = {"teacher_adam": "teacher", "ridge": "baseline"}  # all others are generators


def row(method, value, *, measure="accuracy", seed=0, **changes):
    values = {
        "method": method,
        "kind": KINDS.get(method, "generator"),
        "seed": seed,
        "split": "held_out",
        measure: value,
        f"{measure}_min": 0.61,
        f"{measure}_max": 7.25,
        f"{measure}_std": 0.1,
        "num_tasks": 400,  # a standard error of 0.005
        "latency_ms_p50": 1.25,
        "latency_ms_p99": 1.5,
        "latency_ms_p50_batch": 0.031,
        "latency_ms_p99_batch": 0.042,
        "gradients": 0,
        "forward_passes": 3,
    }
    return values | changes


def objective(method, value, **changes):
    return row(method, value, measure="objective", **changes)


def results(rows=None, **changes):
    values = {
        "schema": 1,
        "family": "digits_5way",
        "measure": "accuracy",
        "main": "lohp",
        "imitated": "teacher_adam",
        "config": {"seed": 17},
        "environment": {"platform": "a machine"},
        "rows": [row(*item) for item in ACCURACY.items()] if rows is None else rows,
        "honesty": {
            "lohp": {
                "shuffled": 0.22,
                "chance": 0.2,
                "rms_ratio": 1.1,
                "nearest_training_distance": 3.25,
                "teacher_nearest_training_distance": 4.5,
                "teacher_distance": 2.5,
            }
        },
    }
    return values | changes


FIGURES = {
    "schema": 1,
    "projection": {
        "explained": [0.5, 0.25],
        "paths": [
            {"method": "teacher_adam", "task": 0, "points": [[0, 0], [1, 2], [2, 2]]},
            {"method": "lohp", "task": 0, "points": [[0, 0], [None, 1], [2, 1.5]]},
            {"method": "lohp", "task": 1, "points": []},
        ],
    },
    "cosine": {"lohp": [0.5, 1.0000001, None], "cloning": []},
    "score_by_step": {
        "lohp": {"step": [0, 4], "mean": [0.2, 0.9], "std": [0.0, 0.1]},
        "teacher_adam": {"step": [0, 1, 2], "mean": [0.2, 0.5, 0.9], "std": [0, 0.1, None]},
    },
}
METRICS = [
    {"method": "lohp", "step": 10, "loss": 500.0, "progress": 0.2, "log_flow": [1, 2]},
    {"method": "lohp", "step": 20, "loss": 2.5, "progress": None, "cosine": 0.9},
    {"method": "hypernetwork", "step": 10, "loss": 1.5},
]


def put(directory, name, content):
    """Writes JSON, or JSON lines from a list."""
    lines = content if isinstance(content, list) else [content]
    (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def put_all(directory):
    put(directory, "results.json", results())
    put(directory, "config.json", {"schema": 1, "training": {"learning_rate": 0.123}})
    put(directory, "figures.json", FIGURES)
    put(directory, "metrics.jsonl", METRICS)
    return directory


@pytest.fixture
def whole(tmp_path):
    """A run directory with all files."""
    return put_all(tmp_path)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report on such a directory."""
    return report(put_all(tmp_path_factory.mktemp("whole")))


class Page(html.parser.HTMLParser):
    """What a browser makes of a report: elements with their attributes, and tables of text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.tables, self.text, self.statement = [], {}, text, ""
        self._inside = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self._rows = self.tables.setdefault(dict(attrs)["class"], [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")
        if tag in ("th", "td", "p"):
            self._inside = dict(attrs).get("class", "cell") if tag == "p" else "cell"

    def handle_endtag(self, tag):
        if tag in ("th", "td", "p"):
            self._inside = None

    def handle_data(self, data):
        if self._inside == "statement":
            self.statement += data
        elif self._inside == "cell" and self.tables:
            self._rows[-1][-1] += data

    def images(self):
        return [attrs for tag, attrs in self.elements if tag == "img"]


def report(directory):
    return Page(write_report(directory).read_text(encoding="utf-8"))


def report_of(directory, rows=None, **changes):
    put(directory, "results.json", results(rows, **changes))
    return report(directory)


def test_rows_are_there_and_sorted_by_accuracy(page):
    head, *rows = page.tables["methods"]

    assert [cells[0] for cells in rows] == ["teacher_adam", "lohp", "cloning", "ridge"]
    assert rows[1] == [
        "lohp",
        "0.950 ± 0.005",
        "s.e. over 400 tasks",
        "0.610",
        "0",
        "3",
        "1.25",
        "1.50",
        "0.0310",
        "0.0420",
    ]
    assert len(head) == len(rows[0])


def test_several_seeds_become_their_mean_and_their_standard_deviation(tmp_path):
    seeds = [0.90, 0.93, 0.96]
    rows = [
        row("lohp", a, seed=i, gradients=300 * i, accuracy_min=a / 2) for i, a in enumerate(seeds)
    ]
    page = report_of(tmp_path, [*rows, row("ridge", 0.5)])

    lohp, ridge = page.tables["methods"][1:]
    assert lohp[1] == f"{statistics.mean(seeds):.3f} ± {statistics.stdev(seeds):.3f}"
    assert lohp[2:5] == ["std over 3 seeds", "0.450", "300"]
    assert ridge[2] == "s.e. over 400 tasks"
    assert page.statement.endswith("(±: s.e. over 400 tasks; std over 3 seeds).")


@pytest.mark.parametrize(
    "lohp, expected",
    [
        (0.95, "0.020 above the best baseline, cloning at 0.930 ± 0.005, beyond the spread"),
        (0.932, "0.002 above the best baseline, cloning at 0.930 ± 0.005, within the spread"),
        (0.9302, "less than 0.001 above the best baseline"),
        (0.93, "level with the best baseline"),
        (0.9298, "less than 0.001 below the best baseline"),
        (0.92, "0.010 below the best baseline, cloning at 0.930 ± 0.005, beyond the spread"),
        (0.4, "0.530 below the best baseline"),
    ],
)
def test_the_statement_says_which_is_higher_and_by_how_much(tmp_path, lohp, expected):
    rows = [row(*item) for item in (ACCURACY | {"lohp": lohp}).items()]
    statement = report_of(tmp_path, rows).statement

    assert f"lohp reaches {lohp:.3f} ± 0.005 on 400 unseen tasks of digits_5way, " in statement
    assert expected in statement
    assert "the best teacher, teacher_adam, reaches 0.970 ± 0.005" in statement


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([], "There is no accuracy of lohp on digits_5way."),
        (
            [row("lohp", None), row("ridge", 0.9)],
            "no accuracy of lohp on digits_5way; the best base",
        ),
        ([row("lohp", 0.9)], "with no baseline to compare it with"),
        ([row("lohp", 0.9), row("ridge", 0.8, accuracy_std=None)], "0.100 above the best baseline"),
        (
            [row("lohp", 0.9), row("ridge", 0.8, num_tasks=0)],
            "ridge at 0.800 ± n/a (spread unknown)",
        ),
        ([row("lohp", 0.9), row("ridge", 0.99, split="train")], "with no baseline"),
    ],
    ids=["empty", "lohp unknown", "alone", "no std", "no tasks", "another split"],
)
def test_the_statement_claims_nothing_that_the_rows_lack(tmp_path, rows, expected):
    assert expected in report_of(tmp_path, rows).statement


@pytest.mark.parametrize(
    "lohp, expected",
    [
        (0.0123, "0.00770 better than the best baseline, cloning at 0.0200 ± 0.0050, beyond"),
        (0.0199, "0.000100 better than the best baseline, cloning at 0.0200 ± 0.0050, within"),
        (0.02, "level with the best baseline, cloning"),
        (3, "2.98 worse than the best baseline, cloning at 0.0200 ± 0.0050, beyond the spread"),
    ],
)
def test_of_an_objective_the_lower_is_the_better(tmp_path, lohp, expected):
    rows = [objective(*item) for item in (OBJECTIVE | {"lohp": lohp}).items()]
    statement = report_of(tmp_path, rows, measure="objective").statement

    number = "3.0000" if lohp == 3 else f"{lohp:.4f}"
    assert f"lohp reaches an objective of {number} ± 0.0050 (lower is better) on 400" in statement
    assert expected in statement
    assert "the best teacher, teacher_adam, reaches 0.0080 ± 0.0050" in statement


def test_the_rows_of_an_objective_start_with_the_lowest_and_show_the_worst_task(tmp_path):
    rows = [objective(*item) for item in OBJECTIVE.items()]
    rows += [objective("lohp", 0.018, seed=1, objective_max=9.5), objective("step", None)]
    page = report_of(tmp_path, rows, measure="objective", honesty=None)

    head, *rows = page.tables["methods"]
    assert head[1] == "Objective,lower is better"
    assert [cells[0] for cells in rows] == ["teacher_adam", "lohp", "cloning", "ridge", "step"]
    assert rows[1][1:4] == ["0.0150 ± 0.0042", "std over 2 seeds", "9.50"]
    assert rows[3][1:4] == ["1.5000 ± 0.0050", "s.e. over 400 tasks", "7.25"]
    assert page.images()[0]["alt"].startswith("Objective, best first: teacher_adam 0.0080 ± 0.0050")
    assert "accura" not in page.text.lower()


@pytest.mark.parametrize(
    "value, std, expected",
    [
        (12.3456, 0.024, "12.3456 ± 0.0012"),
        (0.001234, 100, "0.0012 ± 5.0000"),
        (12345.6, 400, "12,346 ± 20"),
        (3.21e-9, 8e-10, "3.21e-09 ± 4e-11"),
        (3.2e20, 0.1, "3.2e+20 ± 0.005"),
        (-1.5, 0.1, "-1.5000 ± 0.0050"),
        (0, 0.1, "0.0000 ± 0.0050"),
        (0.01234, 0, "0.0123 ± 0.00"),
        (0.01234, None, "0.0123 ± n/a"),
    ],
)
def test_an_objective_of_any_size_is_readable(tmp_path, value, std, expected):
    rows = [objective("lohp", value, objective_std=std)]
    page = report_of(tmp_path, rows, measure="objective")

    assert page.tables["methods"][1][1] == expected
    assert len(page.images()) == 2


def test_a_run_about_another_method_is_the_same_under_its_name(page, tmp_path):
    names = {"lohp": "mine", "teacher_adam": "uphill", "ridge": "simple", "cloning": "copy"}

    def renamed(text):
        return re.sub("|".join(names), lambda match: names[match[0]], text)

    def words(page):
        return re.sub('src="[^"]*"', "", page.text).replace("lohp_jax", "")

    for file in put_all(tmp_path).iterdir():
        file.write_text(renamed(file.read_text()))
    other = report(tmp_path)

    assert words(other) == renamed(words(page))
    assert "<strong>mine</strong>" in other.text


def test_other_generators_are_baselines_and_teachers_are_not(tmp_path):
    rows = [
        row("mine", 0.5),
        row("lohp", 0.6),
        row("teacher_adam", 0.55, kind="baseline"),
        row("best", 0.9, kind="teacher"),
    ]
    statement = report_of(tmp_path, rows, main="mine").statement

    assert "mine reaches 0.500" in statement
    assert "0.100 below the best baseline, lohp at" in statement
    assert "the best teacher, best, reaches 0.900" in statement


def test_another_split_is_a_line_of_its_own(tmp_path):
    page = report_of(tmp_path, [row("lohp", 0.9), row("lohp", 0.99, split="train")])

    assert [cells[:2] for cells in page.tables["methods"][1:]] == [
        ["lohp (split train)", "0.990 ± 0.005"],
        ["lohp", "0.900 ± 0.005"],
    ]
    assert "lohp reaches 0.900" in page.statement


def test_what_is_nan_null_or_absent_is_not_available_and_comes_last(tmp_path):
    bare = {
        "method": "ridge",
        "kind": "baseline",
        "seed": 0,
        "split": "held_out",
        "accuracy": 0.1,
    }
    rows = [
        row("cloning", float("nan"), latency_ms_p50=None, gradients=float("inf")),
        row("lohp", 0.9),
        bare,
    ]
    page = report_of(tmp_path, rows, honesty=None)

    _, lohp, ridge, cloning = page.tables["methods"]
    assert lohp[1] == "0.900 ± 0.005"
    assert ridge[:3] == ["ridge", "0.100 ± n/a", "s.e. over n/a tasks"]
    assert ridge[3:] == ["n/a"] * 7
    assert cloning[:2] == ["cloning", "n/a"]
    assert (cloning[4], cloning[6]) == ("n/a", "n/a")
    assert "nan" not in page.text.split("<h2>Plots")[0]


def test_one_diverged_seed_is_not_averaged_away(tmp_path):
    rows = [row("lohp", 0.9, seed=0), row("lohp", float("nan"), seed=1)]

    assert report_of(tmp_path, rows).tables["methods"][1][1] == "n/a"


@pytest.mark.parametrize(
    "measures, shuffled, ratio",
    [
        ({"shuffled": 0.24, "chance": 0.2, "rms_ratio": 0.81}, "pass", "pass"),
        ({"shuffled": 0.26, "chance": 0.2, "rms_ratio": 0.79}, "fail", "fail"),
        ({"shuffled": 0.54, "chance": 0.6, "rms_ratio": 1.21}, "pass", "fail"),
        ({"shuffled": None, "chance": 0.2}, "not measured", "not measured"),
    ],
)
def test_honesty_marks(tmp_path, measures, shuffled, ratio):
    measures = measures | {"nearest_training_distance": 3.25, "error_overlap": 0.5, "note": "x"}
    page = report_of(tmp_path, honesty={"lohp": measures, "cloning": {}})

    head, lohp, cloning, wanted = page.tables["honesty"]
    assert head[0] == "Method" and head[5] == "Error overlap" and len(head) == 6
    assert lohp[0] == "lohp" and cloning[0] == "cloning"
    assert lohp[1].endswith(shuffled) and cloning[1].endswith("not measured")
    assert lohp[2].endswith(ratio)
    assert lohp[3] == "3.25 generatedn/a teacher"
    assert (lohp[5], cloning[5]) == ("0.500 ", "n/a ")
    assert wanted[1:3] == ["at most 0.05 above chance", "0.8 to 1.2"]
    assert wanted[5] == "no limit"


@pytest.mark.parametrize(
    "measures, expected",
    [
        ({"shuffled": 0.96, "chance": 1.0}, "pass"),
        ({"shuffled": 40, "chance": 1.0}, "pass"),
        ({"shuffled": 0.94, "chance": 1.0}, "fail"),
        ({"shuffled": -2.05, "chance": -2.0}, "pass"),
        ({"shuffled": -2.2, "chance": -2.0}, "fail"),
        ({"shuffled": 0.96}, "not measured"),
    ],
)
def test_with_the_wrong_support_an_objective_has_to_rise_to_chance(tmp_path, measures, expected):
    rows = [objective("lohp", 0.1)]
    page = report_of(tmp_path, rows, measure="objective", honesty={"lohp": measures})

    _, lohp, wanted = page.tables["honesty"]
    assert lohp[1].endswith(expected)
    assert wanted[1] == "at most 5 % below chance"


def test_verdicts_are_told_in_words(tmp_path):
    verdicts = {
        "memory": {"passed": False, "words": "A memory <of> it all."},
        "size": {"passed": None, "words": "Not measured."},
    }
    overall = {"passed": True, "words": "Fine."}
    judged = {"spread_ratio": 0.5, "verdicts": verdicts, "verdict": overall}
    page = report_of(tmp_path, honesty={"ridge": {}, "lohp": judged})

    assert page.tables["verdicts"] == [
        ["Method", "Verdict", "Memory", "Size"],
        ["lohp", "✓ Fine.", "✗ A memory <of> it all.", "? Not measured."],
    ]
    assert "Spread ratio" not in page.tables["honesty"][0]
    assert "verdicts" not in report_of(tmp_path).tables


@pytest.mark.parametrize("imitated", ["teacher_adam", None])
def test_the_imitated_teacher_is_named(tmp_path, imitated):
    page = report_of(tmp_path, imitated=imitated)

    assert ("What generators imitate: teacher_adam." in page.text) == (imitated is not None)


def test_all_plots_are_there_with_words_for_those_who_cannot_see_them(page):
    alts = [image["alt"] for image in page.images()]

    assert alts[0].startswith("Accuracy, best first: teacher_adam 0.970 ± 0.005; lohp 0.950")
    assert "2 unseen tasks" not in alts[1]  # the path without points is none
    assert "75% of the variance" in alts[1]
    assert "lohp has a mean of 0.75" in alts[2]
    assert "lohp ends at 0.900; teacher_adam ends at 0.900" in alts[3]
    assert alts[4].startswith(
        "Accuracy and gradients spent: teacher_adam 0.970 after 0; lohp 0.950"
    )
    assert alts[5] == "Loss by update: lohp ends at 2.50; hypernetwork ends at 1.50."
    assert alts[6] == "Progress by update: lohp ends at 0.200."
    assert len(alts) == 7


FAMILIAR = {
    "distance": [0.1, 0.2],
    "trust": [1.0, 0.5],
    "familiarity": [0.4, 0.02],
}


def test_trust_is_drawn_against_the_distance_of_tasks(tmp_path):
    points = {"train": FAMILIAR, "held_out": FAMILIAR | {"trust": [0.0, 0.0]}}
    put(tmp_path, "figures.json", {"schema": 1, "familiarity": {"lohp": points}})
    image = report_of(tmp_path).images()[-1]
    assert image["alt"].startswith(
        "Trust against distance, on average 0.75 on tasks of the training"
    )
    assert image["alt"].endswith("and 0.00 on unseen tasks.")
    del points["train"]["trust"], points["held_out"]["trust"]  # of a user's own method
    put(tmp_path, "figures.json", {"schema": 1, "familiarity": {"lohp": points}})
    assert "on average 0.21 on tasks" in report_of(tmp_path).images()[-1]["alt"]


def test_walks_and_optimizers_are_lines_over_the_gradients_they_spend():
    def score(method, value, gradients, kind):
        row_ = row(method, value, gradients=gradients, kind=kind)
        return standings(results([row_]), "here").scores[0]

    scores = [
        score("walks", 0.9, 2, "generator"),
        score("lohp", 0.8, 0, "generator"),
        score("adam", 0.7, 50, "baseline"),
        score("adam_10", 0.6, 10, "baseline"),
        score("ridge", 0.5, 0, "baseline"),
        score("ridge_of_mine", 0.4, 0, "baseline"),
        score("adam_2", 0.3, 2, "generator"),
    ]
    curves = {
        "walks": {"gradients": [0, 1, 2], "mean": [0.2, 0.5, 0.9]},
        "lohp": {"gradients": [0, 0, 0], "mean": [0.2, 0.5, 0.8]},
    }
    lines = _lines_by_gradients(scores, curves, "here")
    assert {name: points.tolist() for name, points in lines.items()} == {
        "walks": [[0, 0.2], [1, 0.5], [2, 0.9]],
        "adam": [[10, 0.6], [50, 0.7]],
    }


def test_the_accuracies_are_drawn_at_the_extremes_too(tmp_path):
    rows = [row("lohp", 1.0, accuracy_std=0), row("ridge", 0.0), row("cloning", 0.999)]

    assert len(report_of(tmp_path, rows).images()) == 2


@pytest.mark.parametrize("low", [-1.0, 0.0, 1e-30, 1.0])
def test_objectives_are_drawn_whatever_their_sign_and_size(tmp_path, low):
    curve = {"step": [0, 1, 2], "mean": [1e6, None, low], "std": [2e6, None, 0]}
    put(tmp_path, "figures.json", {"schema": 1, "score_by_step": {"lohp": curve}})
    rows = [objective("lohp", low, objective_std=40), objective("ridge", 1e6)]
    page = report_of(tmp_path, rows, measure="objective")

    assert len(page.images()) == 3
    assert f"lohp ends at {significant(low)}." in page.images()[1]["alt"]


def test_the_page_needs_no_other_file(page):
    sources = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action")
    ]
    assert sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert "url(" not in page.text
    assert "@import" not in page.text
    for source in sources:
        drawing = base64.b64decode(source.partition(",")[2])
        for element in xml.etree.ElementTree.fromstring(drawing).iter():
            for name, value in element.attrib.items():
                assert not name.endswith("href") or value.startswith("#")


def test_absent_files_leave_plots_out_and_the_page_says_so(tmp_path):
    page = report_of(tmp_path, honesty={})

    assert len(page.images()) == 2  # scores and gradients
    assert page.text.count("Left out: figures.json is not there") == 3
    assert "Left out: metrics.jsonl has no loss." in page.text
    assert "Left out: metrics.jsonl has no progress." in page.text
    assert "Left out: results.json has no honesty report." in page.text
    assert "&quot;seed&quot;: 17" in page.text  # the config in the results


def test_config_and_environment_are_in_the_details(page):
    details = html.unescape(page.text.partition("<details>")[2])

    assert '"learning_rate": 0.123' in details
    assert '"platform": "a machine"' in details


def test_everything_is_escaped(tmp_path):
    evil = '<script>alert("$x$ & \\frac")</script>'
    put(tmp_path, "config.json", {"schema": 1, evil: evil})
    put(tmp_path, "metrics.jsonl", [{"method": evil, "step": 1, "loss": 1, "progress": 1}])
    put(
        tmp_path,
        "figures.json",
        {
            "schema": 1,
            "projection": {
                "explained": [1, 0],
                "paths": [{"method": evil, "task": evil, "points": [[0, 0], [1, 1]]}],
            },
            "cosine": {evil: [0.5]},
            "score_by_step": {evil: {"step": [0], "mean": [0.5], "std": [0.1]}},
        },
    )
    rows = [row(evil, 0.9, split=split) for split in ("held_out", evil)]
    page = report_of(
        tmp_path,
        [*rows, row("lohp", 0.5)],
        family=evil,
        environment={evil: evil},
        honesty={evil: {evil: 1.0}},
    )

    assert "<script" not in page.text
    assert page.tables["methods"][1][0].startswith(evil)
    assert f"unseen tasks of {evil}, 0.400 below the best baseline, {evil} at" in page.statement
    assert page.tables["honesty"][1][0] == evil
    assert len(page.images()) == 7
    assert evil in page.images()[0]["alt"]


def test_the_same_files_give_the_same_bytes_and_leave_no_others(whole):
    before = {file.name for file in whole.iterdir()}
    first = write_report(str(whole))

    assert first == whole / "report.html"
    content = first.read_bytes()
    assert write_report(whole).read_bytes() == content
    assert {file.name for file in whole.iterdir()} == before | {"report.html"}


@pytest.mark.usefixtures("page")
def test_pyplot_stays_out():
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_page(tmp_path, monkeypatch, fails):
    put(tmp_path, "results.json", results())
    (tmp_path / "report.html").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "report.html").read_text() == "old"
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "report.html"}


@pytest.mark.parametrize("directory", [".", "absent"])
def test_without_results_the_command_that_makes_them_is_named(tmp_path, directory):
    directory = tmp_path / directory
    with pytest.raises(FileNotFoundError, match=re.escape(f"`lohp evaluate --out {directory}`")):
        write_report(directory)


@pytest.mark.parametrize("name", ["results.json", "figures.json"])
@pytest.mark.parametrize("schema", [2, None])
def test_another_schema_is_refused(whole, name, schema):
    put(whole, name, {**json.loads((whole / name).read_text()), "schema": schema})
    with pytest.raises(ValueError, match=rf"{name} has schema {schema}, .* reads schema 1 only"):
        write_report(whole)
    assert not (whole / "report.html").exists()


@pytest.mark.parametrize(
    "name, text, expected",
    [
        (
            "results.json",
            '{"schema": 1,\n "rows": [}',
            "results.json is damaged .line 2, column 11 is not JSON",
        ),
        ("results.json", "[]", "results.json is damaged .line 1 has a list where an object"),
        ("results.json", b'{"schema\xff": 1}', "results.json is damaged .byte 8 is not UTF-8"),
        ("config.json", "{", "config.json is damaged .line 1"),
        ("figures.json", "", "figures.json is damaged .line 1"),
        (
            "metrics.jsonl",
            '{"method": "lohp", "step": 1}\n\n{"meth',
            "metrics.jsonl is damaged .line 3",
        ),
        ("metrics.jsonl", '{"step": 1}', "metrics.jsonl, line 1 lacks the key 'method'"),
        ("metrics.jsonl", '{"method": "lohp"}', "metrics.jsonl, line 1 lacks the key 'step'"),
        (
            "metrics.jsonl",
            '{"method": "lohp", "step": 1, "loss": "low"}',
            "expected a number at 'loss' of .*metrics.jsonl, line 1, got 'low'",
        ),
    ],
)
def test_damaged_files_are_named_with_the_line(whole, name, text, expected):
    (whole / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=expected):
        write_report(whole)


def without(mapping, key):
    return {name: value for name, value in mapping.items() if name != key}


@pytest.mark.parametrize(
    "content, expected",
    [
        (without(results(), "rows"), "lacks the key 'rows'"),
        (without(results(), "family"), "lacks the key 'family'"),
        (results({"lohp": 1}), "expected a list at 'rows'"),
        (results([without(row("lohp", 0.9), "accuracy")]), r"rows\[0\] lacks the key 'accuracy'"),
        (results([row("lohp", 0.9), 7]), r"rows\[1\] lacks the key 'accuracy'"),
        (results([row("lohp", "high")]), r"number at 'accuracy' of .*rows\[0\], got 'high'"),
        (results([row("lohp", 0.9)] * 2), r"rows\[1\] is a second row of lohp, split held_out"),
        (without(results(), "measure"), "lacks the key 'measure'"),
        (without(results(), "main"), "lacks the key 'main'"),
        (without(results(), "imitated"), "lacks the key 'imitated'"),
        (results(main=None), "expected a str at 'main' of .*results.json, got None"),
        (results(imitated=3), r"expected a str \| None at 'imitated' of .*, got 3"),
        (
            results(measure="loss"),
            "expected one of accuracy, objective at 'measure' of .*results.json, got 'loss'",
        ),
        (results(measure="objective"), r"rows\[0\] lacks the key 'objective'"),
        (results([without(row("lohp", 0.9), "kind")]), r"rows\[0\] lacks the key 'kind'"),
        (
            results([row("lohp", 0.9, kind="ours")]),
            r"expected one of teacher, generator, baseline at 'kind' of .*rows\[0\], got 'ours'",
        ),
        (
            results([row("lohp", 0.9), row("lohp", 0.9, seed=1, kind="teacher")]),
            r"rows\[1\] has lohp as a teacher, but a row before it as a generator",
        ),
        (results(honesty=[1]), "expected a dict at 'honesty'"),
        (results(honesty={"lohp": 1}), "expected a dict at 'lohp' of .*honesty, got 1"),
        (results(honesty={"lohp": {"chance": "5"}}), "number at 'chance' of .*'lohp'"),
    ],
)
def test_results_of_another_form_are_named_with_the_key(tmp_path, content, expected):
    put(tmp_path, "results.json", content)
    with pytest.raises(ValueError, match=expected):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"projection": []}, "expected a dict at 'projection'"),
        ({"projection": {"explained": [1, 0]}}, "projection lacks the key 'paths'"),
        (
            {"projection": {"explained": [1], "paths": []}},
            r"'explained' .* shape \(2,\), got \(1,\)",
        ),
        (
            {"projection": {"explained": [1, 0], "paths": [{"points": [[1, 2, 3]]}]}},
            r"'points' of .*paths\[0\] to have shape \(None, 2\), got \(1, 3\)",
        ),
        ({"cosine": {"lohp": [[1], [1, 2]]}}, "'lohp' of .*cosine is no array"),
        (
            {"score_by_step": {"lohp": {"step": [0, 1], "mean": [0.5], "std": [0.1]}}},
            r"'mean' of .*score_by_step\['lohp'\] to have shape \(2,\), got \(1,\)",
        ),
    ],
)
def test_figures_of_another_form_are_named_with_the_key(whole, changes, expected):
    put(whole, "figures.json", FIGURES | changes)
    with pytest.raises(ValueError, match=expected):
        write_report(whole)
