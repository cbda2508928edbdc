"""The report of Diff-L2O says what its cells say."""

import json

import pytest

from benchmarks.diffl2o import report

ABOUT = {"gap": "relative", "num_instances": 2, "certain": True, "trained_on": "small"}


def cell(gap, **more):
    counts = {"gradient_calls": 10.0, "network_calls": 1.0, "set_up": "eigenvalue"}
    quality = {"gap_mean": gap, "gap_median": gap / 2, "success": 0.5}
    return quality | counts | {"seconds_per_instance": 2e-6} | more


def results(**methods):
    return {"quick": False, "sets": {"one": ABOUT}, "cells": {"one": methods}, "environment": {}}


def test_means_and_spreads_over_seeds():
    assert report.spread([1.0, 3.0]) == "2 ± 1"
    assert report.spread([0.25]) == "0.25"
    assert report.spread([1.0, None]) == "not finite"


def test_a_row_of_the_table():
    rows = {"10": {"0": cell(0.1, training_seconds=7.0), "1": cell(0.3, training_seconds=9.0)}}
    (row,) = report.table({"lista": rows}, ABOUT)[2:]
    assert row == "| lista | 10 | 0.2 ± 0.1 | 0.1 | 0.5 ± 0 | 10 | 1 | eigenvalue | 2 | 8 |"
    rows["10"]["2"] = {"failed": "NaN"}
    failed = report.table({"lista": rows}, ABOUT)[2]
    assert failed == row.replace("lista", "lista (1 of 3 trainings failed)")
    nothing = report.table({"lista": {"10": {"0": {"failed": "NaN"}}}}, ABOUT)[2]
    assert nothing.startswith("| lista (1 of 1 trainings failed) | 10 | |")


def test_files_are_merged_by_cell(tmp_path):
    first = results(fista={"10": {"0": cell(0.5)}})
    second = results(fista={"20": {"0": cell(0.1)}}, lista={"10": {"0": cell(0.2)}})
    report.merge(first, second)
    assert list(first["cells"]["one"]["fista"]) == ["10", "20"]
    assert "lista" in first["cells"]["one"]
    with pytest.raises(SystemExit, match="got one of --quick"):
        report.merge(first, second | {"quick": True})


def test_the_page_and_the_picture(tmp_path):
    path = tmp_path / "found.json"
    path.write_text(
        json.dumps(results(fista_restart={"10": {"0": cell(0.5)}, "20": {"0": cell(0.1)}}))
    )
    report.write(path)
    assert "2 instances, optima proven; 1 seeds" in (tmp_path / "tables_found.md").read_text()
    assert (tmp_path / "results_found.png").stat().st_size > 1000
