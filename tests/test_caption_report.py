"""blip-post --captions: the figures, of a run and of any file of results; the page; and what it says when there is nothing to
compare with."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner, Result

from models import manifest
from postprocess import caption_metrics, caption_report, score_chart
from postprocess.__main__ import main
from postprocess.cider import cider
from postprocess.constant import PICTURES, TRIED, constant_caption
from postprocess.ptb import tokenize
from postprocess.scored import Absent, Scored
from preprocess.checked import Id
from tests import chain
from tests.test_postprocess import refused
from tests.test_report import HOSTILE, Page, refuse_foreign
from tests.text_graphs import call_run, caption_data, stand_in, write_graphs
from tests.written_run import CAPTIONS, PEOPLE, WrittenRun, make_caption_run, named_pictures

FILES_LEFT = ["manifest.json", "report.html", "report.json", "report.txt"]
# Three pictures of COCO and a caption of each, with the figures of pycocoevalcap 1.2 and its Java tokeniser.
GOLDEN_PEOPLE = {
    42: [
        "A woman wearing a net on her head cutting a cake.",
        "A woman cutting a large white sheet cake.",
        "A woman wearing a hair net cutting a large sheet cake.",
        "there is a woman that is cutting a white cake",
        "A woman marking a cake with the back of a chef's knife.",
    ],
    73: [
        "Loads of old motorbikes, parked on the street!",
        "A motorcycle parked in a parking space next to another motorcycle.",
        "An old motorcycle parked beside other motorcycles with a brown leather seat.",
    ],
    74: [
        "A picture of a dog laying on the ground.",
        "Dog snoozing by a bike on the edge of a cobblestone street",
        "The white dog lays next to the bicycle on the sidewalk.",
    ],
}
GOLDEN = {
    "Bleu_1": 0.8725252928,
    "Bleu_2": 0.7489714144,
    "Bleu_3": 0.5982676535,
    "Bleu_4": 0.4117539831,
    "ROUGE_L": 0.5581216151,
    "CIDEr": 1.9353178374,
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without --out writes to the folder it is in, which must not be the checkout."""
    monkeypatch.chdir(tmp_path)


def post(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["--captions", *map(str, arguments)])


def figures(result: Result) -> dict[str, float]:
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("eval_result: ")]
    values: dict[str, float] = ast.literal_eval(line.removeprefix("eval_result: "))
    return values


def report_of(run: WrittenRun, *options: object) -> tuple[Page, dict[str, Any]]:
    out = run.outputs.parent / "report"
    result = post("--outputs", run.outputs, "--out", out, *options)
    assert result.exit_code == 0, result.output
    return Page(out / "report.html"), record(out)


def record(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "report.json").read_text("utf-8"))
    return values


def results_file(path: Path, captions: dict[Any, str]) -> Path:
    path.write_text(json.dumps([{"image_id": each, "caption": text} for each, text in captions.items()]), "utf-8")
    return path


def coco_file(path: Path, references: dict[Any, list[str]]) -> Path:
    """Captions of people in the form of COCO."""
    texts = [{"image_id": each, "caption": text} for each, own in references.items() for text in own]
    path.write_text(json.dumps({"images": [{"id": each} for each in references], "annotations": texts}), "utf-8")
    return path


@pytest.fixture
def golden(tmp_path: Path) -> tuple[Path, Path]:
    """The results and the references."""
    results = results_file(tmp_path / "golden.json", dict(zip(GOLDEN_PEOPLE, CAPTIONS, strict=False)))
    return results, coco_file(tmp_path / "people.json", GOLDEN_PEOPLE)


def test_golden_figures_of_a_file(golden: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "report"
    result = post(golden[0], "--references", golden[1], "--out", out)
    found = figures(result)
    assert list(found) == [*GOLDEN, "agg_metrics"]
    assert found == pytest.approx({**GOLDEN, "agg_metrics": GOLDEN["CIDEr"] + GOLDEN["Bleu_4"]}, abs=1e-6)
    assert sorted(path.name for path in out.iterdir()) == FILES_LEFT
    written = record(out)
    assert written["metrics"] == found
    assert (written["counts"]["words"], written["counts"]["reference_words"]) == (22, 25)
    assert [file["what"] for file in written["files"]] == ["Results", "References"]
    assert manifest.read(out, "report", verify=True).content["metrics"] == found
    page = Page(out / "report.html")
    refuse_foreign(page)
    assert not page.of("img")
    assert "golden" in page.text
    assert not [a for a in page.of("a") if a["href"] in ("#exactness", "#speed")]
    lines = result.stdout.splitlines()
    assert lines[0] == "3 pictures, a caption for each, compared with 11 that people wrote."
    assert ["BLEU-4", "0.412"] in [line.split()[:2] for line in lines]
    assert "  42: a woman cutting a cake with a knife" in lines
    assert "    people: A woman wearing a net on her head cutting a cake." in lines
    assert lines[-1] == str(out / "report.html")
    assert (out / "report.txt").read_text("utf-8").splitlines() == lines[:-1]


@pytest.mark.real_data
def test_published_figures_of_fakecap(tmp_path: Path) -> None:
    """1,000 captions: the table of coco-caption's notebook, and the digits of pycocoevalcap 1.2."""
    folder = Path(os.environ["BLIP_REAL_DATA"]) / "caption_eval/fakecap"
    results, people = folder / "captions_val2014_fakecap_results.json", folder / "captions_val2014_refs1000.json"
    result = post(results, "--references", people, "--out", tmp_path / "report")
    bleu = (0.5793995754573356, 0.40439129741018104, 0.2785363856619147, 0.1908290437674253)
    digits = dict(zip(GOLDEN, (*bleu, 0.39625269357570847, 0.5997905185184199), strict=True))
    assert figures(result) == pytest.approx({**digits, "agg_metrics": digits["CIDEr"] + digits["Bleu_4"]}, abs=1e-9)
    table = dict(re.findall(r"^  (\S+) +([\d.]+)", result.stdout, re.MULTILINE))
    published = {"BLEU-1": "0.579", "BLEU-2": "0.404", "BLEU-3": "0.279", "BLEU-4": "0.191", "ROUGE-L": "0.396", "CIDEr": "0.600"}
    assert {name: table[name] for name in published} == published
    constant = record(tmp_path / "report")["constant"]["metrics"]
    assert 0 < constant["CIDEr"] < 0.1  # 0.047 measured: far below what looks at pictures


def test_a_run_and_its_result_file_have_the_same_figures(tmp_path: Path) -> None:
    run = make_caption_run(tmp_path)
    page, written = report_of(run)
    refuse_foreign(page)
    people = coco_file(tmp_path / "people.json", {40 + n: list(own) for n, own in enumerate(PEOPLE)})
    assert figures(post(run.outputs / "captions.json", "--references", people, "--out", tmp_path / "other")) == written["metrics"]
    assert written["outputs"]["digest"] == manifest.read(run.outputs, "outputs").digest
    assert written["data"]["digest"] == manifest.read(run.data, "data").digest
    assert written["options"]["as"] == "blip"
    assert "k_test" not in written["protocol"]
    assert written["deviations"] == []
    for text in ("a picture of", "original-blip", "1.5e-06", "blip-caption-demo", "weights.safetensors", "set/040.jpg"):
        assert text in page.text


def test_what_blip_run_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder, and of pictures that the command line names."""
    stand_in(monkeypatch)
    graphs = write_graphs(tmp_path, "caption")
    run = WrittenRun(caption_data(tmp_path, graphs, pictures=3), tmp_path / "outputs")
    brief = ("--num-beams", 2, "--min-length", 5, "--max-length", 9)
    chain.done(call_run("caption", graphs, run.outputs, "--data", run.data, *brief, "--num-return", 2))
    page, written = report_of(run)
    assert (written["metrics"], written["options"]["num_beams"], written["options"]["as"]) == (None, 2, "blip")
    assert written["deviations"] == []
    people = coco_file(tmp_path / "people.json", {n: ["a dog on a ball"] for n in range(3)})
    assert report_of(run, "--references", people)[1]["metrics"].keys() == {*GOLDEN, "agg_metrics"}
    named = WrittenRun(run.data, tmp_path / "named/outputs")
    chain.done(call_run("caption", graphs, named.outputs, "--images", "images/0.png,images/2.png", *brief))
    page, written = report_of(named)
    assert written["deviations"] == []
    assert [a["alt"] for a in page.of("img")] == ["images/0.png", "images/2.png"]


def test_cards_are_best_and_worst(tmp_path: Path) -> None:
    page, written = report_of(make_caption_run(tmp_path, more=["what else there is"]))
    cards = [a["class"] for a in page.of("article")]
    assert cards == ["card pair miss"] * 2 + ["card pair hit"] * 2
    assert len(page.of("img")) == 4
    scores = [float(score) for score in re.findall(r'class="verdict">CIDEr ([\d.]+)<', page.source)]
    assert scores[0] == 0 == min(scores)  # the caption of nothing that people wrote
    assert scores[:2] == sorted(scores)[:2]
    assert scores[2:] == sorted(scores, reverse=True)[:2]
    assert sum(scores) / 4 == pytest.approx(written["metrics"]["CIDEr"], abs=0.01)
    assert page.text.index("soup") < page.text.index("a motorcycle parked on the street")
    assert page.text.count("what else there is") == 4
    assert page.text.count("2 captions of people") == 4


def test_the_constant_caption(golden: tuple[Path, Path], tmp_path: Path) -> None:
    """Its figures are those of a file that has it everywhere, and none of the others that were tried is better."""
    post(golden[0], "--references", golden[1], "--out", tmp_path / "a")
    constant = record(tmp_path / "a")["constant"]
    same = results_file(tmp_path / "same.json", dict.fromkeys(GOLDEN_PEOPLE, constant["caption"]))
    assert figures(post(same, "--references", golden[1], "--out", tmp_path / "b")) == constant["metrics"]
    words = [tokenize(own) for own in GOLDEN_PEOPLE.values()]
    others = [cider([text] * 3, words).corpus for own in words for text in own]
    assert constant["metrics"]["CIDEr"] == pytest.approx(max(others))


def test_many_captions_are_tried_on_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, int]] = []

    def counting(candidates: list[str], references: list[list[str]]) -> Scored:
        tried.append((len(candidates), len(set(candidates))))
        return Scored(float(len(tried) == 3), np.zeros(len(candidates)))

    monkeypatch.setattr("postprocess.constant.cider", counting)
    people: dict[Id, list[str]] = {n: [f"caption {n}", "another"] for n in range(1000)}
    assert constant_caption(people) in {text for texts in people.values() for text in texts}
    assert tried == [(PICTURES, 1)] * TRIED


def test_without_references_there_are_captions_alone(tmp_path: Path) -> None:
    run = make_caption_run(tmp_path, references=[[]] * 4)
    page, written = report_of(run)
    refuse_foreign(page)
    assert written["metrics"] is None
    assert written["no_metrics"] == "No metrics: there are no captions that people wrote to compare with."
    assert written["no_metrics"] in page.text
    assert len(page.of("img")) == 4
    assert not page.of("svg")
    text = (tmp_path / "report/report.txt").read_text("utf-8")
    assert "No metrics" in text
    assert "eval_result" not in text
    people = coco_file(tmp_path / "people.json", {40 + n: list(own) for n, own in enumerate(PEOPLE)})
    assert report_of(run, "--references", people)[1]["metrics"]["CIDEr"] > 0


def test_pictures_that_the_command_line_named(tmp_path: Path) -> None:
    """They are shown as long as they are what they were; there is no data folder."""
    run = make_caption_run(tmp_path, outputs={"data": named_pictures(tmp_path, 4)})
    page, written = report_of(run)
    refuse_foreign(page)
    assert (written["data"], written["metrics"]) == (None, None)
    assert [a["alt"] for a in page.of("img")] == [f"named/{n}.png" for n in range(4)]
    (tmp_path / "named/1.png").write_bytes((tmp_path / "named/2.png").read_bytes())
    (tmp_path / "named/3.png").unlink()
    people = coco_file(tmp_path / "people.json", {n: list(own) for n, own in enumerate(PEOPLE)})
    page, written = report_of(run, "--references", people)
    assert {a["alt"] for a in page.of("img")} == {"named/0.png", "named/2.png"}
    assert "named/1.png" in page.text
    assert written["metrics"]["CIDEr"] > 0
    refused(post("--outputs", run.outputs, "--data", run.data), 2, "named on the command line")


def test_a_picture_captioned_twice(tmp_path: Path) -> None:
    named = named_pictures(tmp_path, 4)
    named["images"][1]["image_id"] = 0
    run = make_caption_run(tmp_path, outputs={"data": named})
    report_of(run)
    people = coco_file(tmp_path / "people.json", {0: ["a cake"]})
    refused(post("--outputs", run.outputs, "--references", people), 1, "two captions of the same picture")


def test_a_part_of_the_references(golden: tuple[Path, Path], tmp_path: Path) -> None:
    some = results_file(tmp_path / "some.json", {"000073": CAPTIONS[1], 42: CAPTIONS[0]})
    refused(post(some, "--references", golden[1]), 1, "1 of 3 pictures have no result: 74")
    out = tmp_path / "report"
    result = post(some, "--references", golden[1], "--subset", "--out", out)
    assert "1 more pictures have no caption and do not count." in result.stdout
    two = coco_file(tmp_path / "two.json", {each: GOLDEN_PEOPLE[each] for each in (42, 73)})
    assert figures(result) == figures(post(some, "--references", two, "--out", tmp_path / "whole"))
    assert record(out)["counts"]["without_caption"] == 1
    assert "1 picture with references and without a caption" in Page(out / "report.html").text


def test_pictures_of_a_folder(golden: tuple[Path, Path], tmp_path: Path) -> None:
    """By the numbers in their names; what has no file is shown by its id."""
    named_pictures(tmp_path, 3)
    folder = tmp_path / "named"
    (folder / "0.png").rename(folder / "COCO_val2014_000000000042.png")
    (folder / "1.png").rename(folder / "000074.png")
    asked = (golden[0], "--references", golden[1], "--out", tmp_path / "report", "--images", folder)
    assert post(*asked).exit_code == 0
    page = Page(tmp_path / "report/report.html")
    refuse_foreign(page)
    assert {a["alt"] for a in page.of("img")} == {"COCO_val2014_000000000042.png", "000074.png"}
    assert sorted(str(a["class"]).split()[-1] == "bare" for a in page.of("article")) == [False, False, True]
    (folder / "42.png").write_bytes((folder / "2.png").read_bytes())
    refused(post(*asked), 1, "could both be the picture 42")


def test_karpathys_own_file(golden: tuple[Path, Path], tmp_path: Path) -> None:
    entries = [
        {"filename": f"COCO_{each:012d}.jpg", "split": split, "sentences": [{"raw": text} for text in texts]}
        for (each, texts), split in zip(GOLDEN_PEOPLE.items(), ("val", "val", "test"), strict=True)
    ]
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"images": entries}), "utf-8")
    two = results_file(tmp_path / "two.json", {42: CAPTIONS[0], 73: CAPTIONS[1]})
    found = figures(post(two, "--references", path, "--split", "val", "--out", tmp_path / "a"))
    people = coco_file(tmp_path / "two people.json", {each: GOLDEN_PEOPLE[each] for each in (42, 73)})
    assert found == figures(post(two, "--references", people, "--out", tmp_path / "b"))


def test_metrics_are_chosen_by_name(golden: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (golden[0], "--references", golden[1], "--out", tmp_path / "report")
    monkeypatch.setitem(caption_metrics.JAVA, "METEOR", lambda texts, _: Scored(0.25, np.full(len(texts), 0.25)))
    monkeypatch.setitem(caption_metrics.JAVA, "SPICE", lambda *_: Absent("SPICE needs Java, and there is no java on the PATH."))
    result = post(*asked, "--metrics", "spice, CIDEr-D,meteor")
    assert figures(result) == pytest.approx({"METEOR": 0.25, "CIDEr-D": GOLDEN["CIDEr"]}, abs=1e-6)
    assert re.search(r"SPICE +–  not computed: SPICE needs Java, and there is no java on the PATH.", result.stdout)
    assert "BLEU" not in result.stdout
    page, written = Page(tmp_path / "report/report.html"), record(tmp_path / "report")
    assert "not computed: SPICE needs Java" in page.text
    assert list(written["absent"]) == ["SPICE"]
    assert "METEOR" not in written["constant"]["metrics"]  # Java is not started for it
    assert list(figures(post(*asked))) == [*GOLDEN, "agg_metrics"]
    assert {name: "it was not asked for" in why for name, why in record(tmp_path / "report")["absent"].items()} == {
        "METEOR": True,
        "SPICE": True,
    }
    refused(post(*asked, "--metrics", "bleu,cidre"), 2, "no metric 'cidre'", "cider-d")


def test_empty_captions_count_as_nothing(golden: tuple[Path, Path], tmp_path: Path) -> None:
    results = results_file(tmp_path / "golden.json", {42: CAPTIONS[0], 73: " ", 74: CAPTIONS[2]})
    assert post(results, "--references", golden[1], "--out", tmp_path / "report").exit_code == 0
    page = Page(tmp_path / "report/report.html")
    assert "1 caption is empty and cannot match anything." in page.text
    assert record(tmp_path / "report")["counts"]["empty"] == 1


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    safe = [text.encode("utf-8", "replace").decode("utf-8") for text in HOSTILE]
    nasty = [*safe, "\x1b[31m\x07red", "@0@ $\\frac{1}{0}$"]
    images = [{"image": f"{text[:200]}/{n}.jpg", "width": 60, "height": 40, "image_id": 40 + n} for n, text in enumerate(nasty)]
    run = make_caption_run(
        tmp_path,
        nasty,
        [[text[:300] for text in nasty[::-1]]] * len(nasty),
        {"images": images},
        {"options": {"prompt": nasty[0]}},
    )
    page, _ = report_of(run)
    refuse_foreign(page)
    for text in ("<script>alert(1)</script>", "@0@ $\\frac{1}{0}$"):
        assert text in page.text
    assert len(page.source) < 1_000_000  # ten thousand words are cut
    text = (tmp_path / "report/report.txt").read_text("utf-8")
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert max(map(len, text.splitlines())) < 300


def test_half_a_surrogate_pair_does_not_stop_the_report(tmp_path: Path) -> None:
    page, _ = report_of(make_caption_run(tmp_path, ["CUT \ud83d", *CAPTIONS[1:]]))
    assert "CUT ?" in page.text


def test_writes_the_same_report_again(tmp_path: Path) -> None:
    run = make_caption_run(tmp_path)
    report_of(run)
    first = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    report_of(run)
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == first


def test_a_single_picture_has_a_report_too(tmp_path: Path) -> None:
    page, written = report_of(make_caption_run(tmp_path, CAPTIONS[:1], PEOPLE[:1]))
    refuse_foreign(page)
    assert written["metrics"]["CIDEr"] == 0
    assert "Of a single picture CIDEr is always 0" in page.text


def test_what_another_protocol_was_used_for_is_said(tmp_path: Path) -> None:
    run = make_caption_run(tmp_path / "plain")
    plain, _ = report_of(run)
    assert 'class="notes"' not in plain.source
    protocol = manifest.read(run.data, "data").content["protocol"] | {"interpolation": "bilinear"}
    broken = [{"image": "gone.jpg", "entry": 3, "reason": "does not exist"}]
    page, written = report_of(make_caption_run(tmp_path / "bent", data={"protocol": protocol, "broken": broken}))
    assert "interpolation bilinear" in page.text
    assert "1 broken sample" in page.text
    assert written["left_out"] == broken


@pytest.mark.parametrize("scores", [[0.0], [0.0, 9.99], [0.3, 1.0, 1.0, 2.5], np.linspace(0, 10, 99)])
def test_the_chart_counts_every_score(scores: list[float]) -> None:
    own, constant = np.array(scores), np.zeros(len(scores))
    spread = score_chart.by_score(own, constant)
    assert sum(spread.own) == sum(spread.constant) == len(own)
    assert spread.edges[-1] >= own.max()
    assert len(spread.own) <= score_chart.BARS
    svg = score_chart.drawing(spread)
    assert ElementTree.fromstring(svg).attrib.keys() == {"viewBox", "version"}
    assert {"var(--reranked)", "var(--chance)", "var(--muted)"} <= set(re.findall(r"var\([^)]*\)", svg))
    assert "#0" not in svg
    assert svg == score_chart.drawing(spread)


def test_names_of_metrics() -> None:
    assert caption_report.chosen(caption_report.USUAL) == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
    assert caption_report.chosen(",".join(caption_report.METRICS)) == list(caption_metrics.NAMES)
