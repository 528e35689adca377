"""What a notebook shows: well-formed pictures in colours of the page, and no mark-up of others."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from fedloom.report.notebook_view import MOST_CLIENTS, partition_html, result_html, result_words, score_svg
from fedloom.report.run_log import read_run_log
from tests.support.fake_runs import write_run


def test_a_picture_of_a_score_is_one_well_formed_element_in_colours_of_the_page(tmp_path: Path) -> None:
    names = ["<b>", "a & b", '"quoted"', "x", "y", "z"]
    folder = write_run(tmp_path / "run", name="<script>alert(1)</script>", labels=names)
    drawn = score_svg(read_run_log(folder)).partition("<br>")[0]
    tree = ElementTree.fromstring(drawn)
    points = next(line.get("points", "") for line in tree if line.get("stroke") != "currentColor").split()
    assert len(points) == len(read_run_log(folder).scores)
    assert all(0 <= float(x) <= 320 and 0 <= float(y) <= 90 for x, y in (point.split(",") for point in points))
    assert "<script>" not in result_html(read_run_log(folder))
    assert score_svg(read_run_log(write_run(tmp_path / "short", rounds=0, status="interrupted"))) == ""


def test_a_result_in_a_few_words_is_plain_text(tmp_path: Path) -> None:
    words = result_words(read_run_log(write_run(tmp_path / "run")))
    assert words.isascii()
    assert words.startswith("finished, 12 rounds, accuracy ")
    assert result_words(read_run_log(write_run(tmp_path / "cut", rounds=0, status="interrupted"))).startswith(
        "interrupted, 0 "
    )


def test_of_many_clients_the_largest_and_the_smallest_are_listed_each_with_a_bar_of_all_its_labels() -> None:
    names = [f"<label {k}>" for k in range(12)]
    clients = {f"c{k:03d}": {"examples": k + 1, "held_out": 0, "labels": [k + 1] + [0] * 11} for k in range(90)}
    clients["<b>"] = {"examples": 200, "held_out": 0, "labels": list(range(12))}
    shown = partition_html({"clients": clients, "label_names": names, "label_js": 0.5, "size_cv": 0.1})
    tree = ElementTree.fromstring(f"<div>{shown.replace('&nbsp;', ' ')}</div>")
    rows = [row for row in tree.iter("tr") if row.find("td") is not None]
    assert len(rows) == MOST_CLIENTS
    assert [row.findtext("td") for row in (rows[0], rows[1], rows[-1])] == ["<b>", "c089", "c000"]
    widths = [float(part.get("width", "")) for part in rows[0].iter("rect")]
    assert sum(widths) == 160.0 or abs(sum(widths) - 160.0) < 1.0
    assert f"{91 - MOST_CLIENTS} more clients" in shown
