"""The report: valid, self-contained, equal to the JSON, and opened in a browser without network."""

import base64
import json
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qsm_deploy.export.check import report as check_report
from qsm_deploy.export.check.cli import main
from qsm_deploy.export.check.figures import round_up
from qsm_deploy.export.check.text import number
from qsm_deploy.kernels.geometry import shape_text
from qsm_deploy.runtime.card.card import METADATA_KEY
from qsm_deploy.runtime.page.parts import cells, note, table
from qsm_deploy.runtime.sessions.bundled import BUNDLED_MODEL
from tests.browsing import Page, assert_asks_nobody, driven, screenshot

image = pytest.importorskip("matplotlib.image")

GREEN, RED = (232, 245, 233), (253, 236, 234)  # behind the verdict
DARK = (11, 13, 16)  # around the pictures
FACTOR = 1.02


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, tuple[str, dict, Path]]:
    """Return the page and the document of an engine that passes and of one that does not."""
    folder = tmp_path_factory.mktemp("reports")
    made = {}
    for verdict, code in (("pass", 0), ("fail", 5)):
        model = onnx.load(BUNDLED_MODEL)
        if verdict == "fail":
            (last,) = (node for node in model.graph.node if "chi_ppm" in node.output)
            last.output[0] = "before"
            model.graph.initializer.append(numpy_helper.from_array(np.float32(FACTOR), "factor"))
            model.graph.node.append(helper.make_node("Mul", ["before", "factor"], ["chi_ppm"]))
        engine, page = folder / f"{verdict} <&>.onnx", folder / f"{verdict}.html"
        onnx.save(model, engine)
        arguments = ["--shapes", "16,20,40", "--threads", "1", "--backend", "onnxruntime"]
        printed = folder / f"{verdict}.json"
        with pytest.MonkeyPatch.context() as patch, printed.open("w") as stdout:
            patch.setattr("sys.stdout", stdout)
            assert main([str(engine), *arguments, "--json", "--html", str(page), "-q"]) == code
        made[verdict] = page.read_text(), json.loads(printed.read_text()), page
    return made


def test_tags_nest_and_nothing_comes_from_elsewhere(reports) -> None:
    for text, _, _ in reports.values():
        assert_asks_nobody(text)
        assert Page(text).images == 2
        assert text.count('class="volume"') == 3


def test_its_pictures_are_whole(reports) -> None:
    for text, _, _ in reports.values():
        for link in Page(text).links:
            png = image.imread(BytesIO(base64.b64decode(link.split(",")[1])))
            assert min(png.shape[:2]) > 300


def test_its_difference_is_seen_to_its_last_digit(reports, tmp_path) -> None:
    """However small: a page of a good engine shows where it differs, not a grey plane."""
    for text, document, _ in reports.values():
        (first,) = re.findall(r'class="facts">(.*?)</script>', text)
        *_, difference = json.loads(first)["rows"]
        drawn = [row for row in document["comparisons"] if row["run"] == "whole"][-1]
        assert difference["step"] < drawn["max_ppb"] / 1000
        body = "return document.querySelectorAll('.value')[2].textContent"
        value, unit = driven(text, tmp_path, body).split()
        assert abs(float(value)) == pytest.approx(drawn["max_ppb"], rel=0.01)
        assert unit == "ppb"


def test_its_numbers_are_those_of_the_json(reports) -> None:
    for text, document, _ in reports.values():
        page = Page(text)
        shown = {tuple(row[:5]): row[5:] for row in page.rows if len(row) > 10}
        for row in document["comparisons"]:
            shape = shape_text(row["shape"])
            numbers = shown[row["subject"], shape, row["run"], row["output"], row["by"]]
            names = ("mean_ppb", "median_ppb", "p999_ppb", "max_ppb", "bias_ppb")
            names += ("nrmse_percent", "xsim_loss", "hfen_percent")
            assert numbers[:8] == [number(row[name]) for name in names]
            residual = [number(row["field_residual"][side]) for side in ("engine", "reference")]
            assert numbers[8] == " / ".join(residual)
            assert numbers[9:] == ([f"{row['dgm_slope']:.4f}"] if "dgm_slope" in row else [])
        cells_shown = {cell for row in page.rows for cell in row}
        assert {document["engine"]["sha256"]} <= cells_shown
        assert document["evaluations"][0]["how"] in text
        assert {"Budgets", "Engine and reference", "Against the truth", "By region"} <= set(
            page.headings
        )


def test_the_verdict_comes_first_and_names_metric_value_and_budget(reports) -> None:
    passed, failed = reports["pass"][0], reports["fail"][0]
    assert "<strong>PASS</strong><p>4 comparisons, each within every budget</p>" in passed
    first = reports["fail"][1]["failures"][0]
    line = f"max_ppb is {first['value']:.3g} ppb, the budget is 0.01 ppb ({first['where']})"
    assert f"<strong>FAIL</strong><p>{line}</p>" in failed
    assert failed.index("FAIL") < failed.index("<table")
    assert [Page(passed).rows[2][n] for n in (0, 2)] == ["max_ppb", "0.01 ppb"]
    exceeded = [row for row in Page(failed).rows if "exceeded" in row]
    assert [row[0] for row in exceeded] == ["max_ppb"]


def test_names_of_files_are_escaped(reports) -> None:
    text = reports["pass"][0]
    assert "<h1>pass &lt;&amp;&gt;.onnx: tv-unet in fp32</h1>" in text
    assert "<&>" not in text


def test_without_labels_truth_or_field_the_sections_are_left_out(reports) -> None:
    document = json.loads(json.dumps(reports["pass"][1]))
    for row in document["comparisons"]:
        for name in ("against_truth", "regions", "field_residual", "dgm_slope", "bias_by_field"):
            row.pop(name, None)
    page = Page(check_report.report_html(document, []))
    assert "Against the truth" not in page.headings
    assert "By region" not in page.headings
    (head,) = (row for row in page.rows if row[:5] == ["volume", "shape", "run", "output", "by"])
    assert not {"deep grey slope", "field residual, engine / reference"} & set(head)


def test_a_map_that_is_not_finite_is_reported_and_not_drawn(reports) -> None:
    document = json.loads(json.dumps(reports["pass"][1]))
    row = document["comparisons"][0]
    kept = ("subject", "shape", "run", "output", "by", "where")
    document["comparisons"] = [{k: row[k] for k in kept} | {"nonfinite_voxels": 7}]
    document["failures"] = [
        {"metric": "nonfinite_voxels", "value": 7, "budget": 0.0, "where": row["where"]}
    ]
    text = check_report.report_html(document | {"verdict": "fail"}, [])
    assert "nonfinite_voxels is 7 voxels, the budget is 0 voxels" in text
    assert Page(text).images == 0


@pytest.mark.parametrize(("verdict", "colour"), [("pass", GREEN), ("fail", RED)])
def test_it_opens_in_a_browser_without_a_network(verdict, colour, reports, tmp_path) -> None:
    shot = screenshot(reports[verdict][2], tmp_path, 1200, 3200)
    pixels = np.rint(255 * image.imread(shot)[..., :3]).astype(int)
    assert pixels.shape[:2] == (3200, 1200)

    def share(wanted: tuple[int, int, int]) -> float:
        return float((np.abs(pixels - wanted).max(axis=-1) <= 2).mean())

    assert share(colour) > 0.01  # the verdict
    assert share({"pass": RED, "fail": GREEN}[verdict]) < share(colour) / 3
    assert share(DARK) > 0.03  # a picture was drawn
    assert share((255, 255, 255)) > 0.4  # on a light page
    assert (pixels[-200:] < 128).any()  # whose text goes on to the end


def test_the_report_needs_matplotlib_before_any_work(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(
        "qsm_deploy.runtime.page.figure.importlib.util.find_spec", lambda name: None
    )
    assert main([str(BUNDLED_MODEL), "--html", str(tmp_path / "a.html"), "-q"]) == 4
    assert "matplotlib" in capsys.readouterr().err


def test_an_existing_report_needs_force(capsys, tmp_path) -> None:
    page = tmp_path / "a.html"
    page.write_text("kept")
    assert main([str(BUNDLED_MODEL), "--html", str(page), "-q"]) == 2
    assert "a.html exists; pass --force" in capsys.readouterr().err
    assert page.read_text() == "kept"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (0.0, "0"),
        (1, "1"),
        (0.012345, "0.0123"),
        (123.4, "123"),
        (-2360.4, "-2360"),
        (1.23456e-5, "1.2e-05"),
    ],
)
def test_numbers_have_as_many_digits_as_they_deserve(value, text) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "limit"), [(0.7, 1), (1, 1), (1.01, 2), (2.3, 5), (6, 10), (0.0042, 0.005), (0, 1)]
)
def test_windows_end_on_round_numbers(value, limit) -> None:
    assert round_up(value) == pytest.approx(limit)


def test_what_is_put_into_a_page_is_escaped() -> None:
    text = table(("a<b",), [cells("<script>")]) + note("&")
    assert "&lt;script&gt;" in text
    assert "a&lt;b" in text
    assert "&amp;" in text


def test_the_card_is_that_of_the_engine(reports) -> None:
    model = onnx.load(BUNDLED_MODEL)
    card = json.loads(next(p.value for p in model.metadata_props if p.key == METADATA_KEY))
    engine = reports["pass"][1]["engine"]
    assert engine["weights_sha256"] == card["weights_sha256"]
