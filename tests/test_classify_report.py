"""blip-post --top1: what it prints, the files it leaves, its page, and what it says when something is wrong."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner, Result

from models import manifest
from postprocess import classify_report, confusion, top1
from postprocess.__main__ import main
from postprocess.answers import TOP, answers
from postprocess.gallery import HITS, MISSES
from preprocess.tensors import FILES
from tests.classify_run import CLASSES, ClassifyRun, make_classify_run, softmax
from tests.retrieval_run import make_run
from tests.test_postprocess import refused
from tests.test_report import HOSTILE, Page, refuse_foreign

FILES_LEFT = [
    "manifest.json",
    "predictions.json",
    "report.html",
    "report.json",
    "report.txt",
    "zero_shot_image_classification_result.txt",
]


def post(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["--top1", *map(str, arguments)])


def made(root: Path, **parts: Any) -> tuple[Page, dict[str, Any]]:
    run = make_classify_run(root, **parts)
    written = classify_report.write(run.outputs, None, root / "report")
    return Page(written.page), json.loads((root / "report/report.json").read_text("utf-8"))


@pytest.fixture
def run(tmp_path: Path) -> ClassifyRun:
    return make_classify_run(tmp_path)


def test_prints_the_numbers_and_leaves_the_files(run: ClassifyRun, tmp_path: Path) -> None:
    out = tmp_path / "report"
    result = post("--outputs", run.outputs, "--out", out)
    assert result.exit_code == 0, result.output
    order = np.argsort(-run.probability, axis=1, kind="stable")  # the labels are the classes
    first, five = (100 * float((order[:, :k] == run.label[:, None]).any(1).mean()) for k in (1, 5))
    lines = result.stdout.splitlines()
    assert lines[0] == "60 pictures of 7 classes, 7 labels. Accuracy in percent:"
    assert lines[2].split() == ["Top-1", f"{first:.2f}"]
    assert lines[3].split() == ["Top-5", f"{five:.2f}"]
    assert lines[5].split() == ["Chance", f"{100 / 7:.2f}"]
    assert lines[7].split() == ["Class", "Top-1", "Pictures", "Most", "frequent", "wrong", "answer"]
    own = order[run.label == 0, 0]
    assert lines[8].split()[:4] == ["a", "cat", f"{100 * np.mean(own == 0):.2f}", str(len(own))]
    (line,) = [line for line in lines if line.startswith("Top1 Accuracy = ")]
    right = int((order[:, 0] == run.label).sum())
    assert ast.literal_eval(line.removeprefix("Top1 Accuracy = ")) == {"Top1 Accuracy": right / 60}
    assert lines[-1] == str(out / "report.html")
    assert sorted(path.name for path in out.iterdir()) == FILES_LEFT
    found = manifest.read(out, "report", verify=True)
    assert found.content["task"] == "classify"
    assert found.content["metrics"]["top1"] == pytest.approx(first)
    assert found.content["outputs"]["digest"] == manifest.read(run.outputs, "outputs").digest
    assert found.content["data"]["digest"] == manifest.read(run.data, "data").digest
    assert (out / "report.txt").read_text("utf-8").splitlines() == lines[:-1]


def test_predictions_in_both_forms(run: ClassifyRun, tmp_path: Path) -> None:
    assert post("--outputs", run.outputs, "--out", tmp_path / "report").exit_code == 0
    found = json.loads((tmp_path / "report/predictions.json").read_text("utf-8"))
    assert ast.literal_eval((tmp_path / "report" / classify_report.RESULT).read_text("utf-8")) == found
    assert len(found) == 60
    for row, probability in zip(found, run.probability, strict=True):
        best = np.argsort(-probability, kind="stable")[:TOP]
        assert [one["label"] for one in row] == [CLASSES[label] for label in best]
        assert np.array_equal(np.float32([one["score"] for one in row]), probability[best])


def test_the_record_adds_up(tmp_path: Path) -> None:
    labels = ["a tree", *CLASSES[::-1]]
    _, record = made(tmp_path, labels=labels, label=[0, 1, 2, 3, 4, 5] * 9)
    cells, classes = record["confusion"], record["classes"]
    for each in classes:
        own = [cell for cell in cells if cell["class"] == each["class"]]
        wrong = [cell["pictures"] for cell in own if cell["predicted"] != each["class"]]
        assert sum(cell["pictures"] for cell in own) == each["pictures"] == (0 if each["class"] == "a car" else 9)
        assert sum(cell["pictures"] for cell in own if cell["predicted"] == each["class"]) == each["right"]
        assert each["most_frequent_wrong_pictures"] == max(wrong, default=0)
    assert 100 * sum(each["right"] for each in classes) / 54 == pytest.approx(record["metrics"]["top1"])
    assert classes[-1]["top1"] is None
    assert record["counts"] == {
        "pictures": 54,
        "classes": 7,
        "labels": 8,
        "distractors": 1,
        "without_pictures": 1,
        "left_out": 0,
    }
    assert record["labels"] == labels
    protocol = record["protocol"]
    assert (protocol["query"], protocol["templates"]) == ("first", ["a picture of {}"])
    assert (protocol["temperature"], protocol["temperature_from"], protocol["image_size"]) == (0.07, "checkpoint", 24)
    assert "k_test" not in protocol
    assert record["deviations"] == []


def test_writes_the_same_report_again(run: ClassifyRun, tmp_path: Path) -> None:
    out = tmp_path / "report"
    assert post("--outputs", run.outputs, "--out", out).exit_code == 0
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert post("--outputs", run.outputs, "--out", out).exit_code == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


def test_reads_one_file_per_sample(tmp_path: Path) -> None:
    page, _ = made(tmp_path, layout=FILES)
    assert page.of("img")


def test_numbers_on_the_page_are_those_of_the_record(tmp_path: Path) -> None:
    page, record = made(tmp_path)
    refuse_foreign(page)
    big = re.findall(r'<p class="big">([\d.]+)<', page.source)
    assert big == [f"{record['metrics'][name]:.1f}" for name in ("top1", "top5", "mean_class")]
    table = page.source[page.source.index('<section id="classes">') : page.source.index('<section id="protocol">')]
    assert re.findall(r'<td class="number">([\d.]+)</td>', table) == [
        text
        for number, each in enumerate(record["classes"], 1)
        for text in (str(number), str(each["pictures"]), f"{each['top1']:.2f}")
    ]
    for text in ("a picture of {}", "checkpoint", "1.5e-06", record["data"]["digest"], "weights.safetensors"):
        assert text in page.text
    cards = [a["class"] for a in page.of("article")]
    wrong = 60 - sum(each["right"] for each in record["classes"])
    assert (cards.count("card pair miss"), cards.count("card pair hit")) == (min(MISSES, wrong), HITS)
    assert len(page.of("img")) == len(cards)


def test_cards_mark_the_right_label(tmp_path: Path) -> None:
    """Ten labels, of which the right one is always the last: rank 10, shown below the five best."""
    names = [f"n{i}" for i in range(10)]
    logits = np.broadcast_to(np.linspace(3, 0, 10), (4, 10))
    page, record = made(tmp_path, classes=names, label=[9] * 4, probability=softmax(logits))
    assert record["metrics"] == {"top1": 0.0, "top5": 0.0, "mean_class": 0.0, "chance": 10.0}
    assert page.text.count("Right label at rank 10 of 10") == 4
    assert [a["class"] for a in page.of("li") if "late" in (a.get("class") or "")] == ["right late"] * 4
    assert "None: no first answer was right." in page.text
    shown = [float(width) for width in re.findall(r'class="likely"><b style="width: ([\d.]+)%', page.source)][:6]
    assert shown == [round(float(p) * 100, 2) for p in softmax(logits)[0][[0, 1, 2, 3, 4, 9]]]


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    """In classes, labels, templates, paths: they are shown, they never become elements, nor mathematics in the drawing."""
    safe = [text.encode("utf-8", "replace").decode("utf-8") for text in HOSTILE]
    classes = [*safe, r"$\frac{1}{0}$ ^_$", "@0@", "#050505", "\x1b[31m\x07red"]
    labels = [*classes, "<b>bold</b>"]
    images = [{"image": f"{safe[n % 6]}/{n}.jpg", "width": 60, "height": 40} for n in range(60)]
    page, _ = made(
        tmp_path, classes=classes, labels=labels, data={"images": images}, outputs={"templates": [f"{safe[0]} {{}}", safe[1]]}
    )
    refuse_foreign(page)
    for text in (
        "<b>bold</b>",
        "<script>alert(1)</script>",
        r"$\frac{1}{0}$ ^_$",
        "@0@",
        "#050505",
        "<script>alert(1)</script> {}",
    ):
        assert text in page.text
    assert len(page.source) < 1_000_000  # ten thousand words are cut
    text = (tmp_path / "report/report.txt").read_text("utf-8")
    assert "?[31m?red" in text
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert max(map(len, text.splitlines())) < 100


def test_half_a_surrogate_pair_does_not_stop_the_report(tmp_path: Path) -> None:
    page, record = made(tmp_path, classes=["a cat", "CUT \ud83d"])
    assert "CUT ?" in page.text
    assert record["labels"][1] == "CUT \ud83d"
    assert "'CUT \\ud83d'" in (tmp_path / "report" / classify_report.RESULT).read_text("utf-8")


def test_few_labels_have_no_top5(tmp_path: Path) -> None:
    run = make_classify_run(tmp_path, classes=CLASSES[:5])
    result = post("--outputs", run.outputs, "--out", tmp_path / "report")
    assert re.search(r"Top-5 +–  \(of 5 labels it is 100\)", result.stdout)
    page = Page(tmp_path / "report/report.html")
    assert "With 5 labels top-5 would always be 100 %" in page.text
    assert page.source.count('<p class="big">') == 2
    assert json.loads((tmp_path / "report/report.json").read_text())["metrics"]["top5"] is None


NAMED = "'a cat', 'a dog', 'a red fox', 'a bird', 'a fish' and 2 more"


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (
            ["sunflower", "tree", "dog", "cat", "toy", "<i>"],
            f"7 of the 7 classes that the pictures have are {{}} 6 {{}} {NAMED}.",
        ),
        (["tree", *CLASSES[1:]], "1 of the 7 classes that the pictures have is {} 7 {} 'a cat'."),
    ],
)
def test_a_class_without_its_label_gives_answers_without_accuracy(tmp_path: Path, labels: list[str], says: str) -> None:
    run, report = make_classify_run(tmp_path, labels=labels), tmp_path / "report"
    result = post("--outputs", run.outputs, "--out", report)
    assert result.exit_code == 0, result.output
    why = "No accuracy: " + says.format("not among the", "labels of the run:")
    assert f"{why} The answers are in predictions.json." in result.stdout
    assert "Top1 Accuracy" not in result.stdout
    assert sorted(path.name for path in report.iterdir()) == FILES_LEFT
    record = json.loads((report / "report.json").read_text())
    assert (record["metrics"], record["classes"], record["confusion"]) == (None, [], [])
    assert record["no_accuracy"] == why
    assert len(json.loads((report / "predictions.json").read_text("utf-8"))) == 60
    page = Page(report / "report.html")
    refuse_foreign(page)
    assert why in page.text
    assert len(page.of("article")) == MISSES
    assert not [a for a in page.of("a") if a["href"] in ("#confusion", "#classes")]
    assert "right" not in {a.get("class") for a in page.of("li")}


def test_what_the_reader_should_know_is_said(tmp_path: Path) -> None:
    plain, _ = made(tmp_path / "plain")
    assert 'class="notes"' not in plain.source
    broken = [{"image": f"gone{n}.jpg", "entry": n, "reason": "does not exist"} for n in range(3)]
    page, record = made(
        tmp_path / "bent",
        labels=[*CLASSES, "a tree", "a stone"],
        label=[0, 1, 2] * 5,
        data={"broken": broken, "source": {"kind": "cifar", "folder": "/cifar-100-python", "split": "test", "labels": "fine"}},
        outputs={"temperature_from": "default"},
    )
    for text in (
        "2 labels name no class",
        "4 classes without pictures",
        "has no temperature, so 0.07",
        "3 broken samples",
        "pictures from cifar /cifar-100-python test fine",
    ):
        assert text in page.text
    assert record["left_out"] == broken


@pytest.mark.parametrize(("classes", "label"), [(["a cat"], [0]), (["a cat", "a dog"], [1]), (CLASSES[:3], [0, 1])])
def test_the_smallest_sets_have_a_report_too(tmp_path: Path, classes: list[str], label: list[int]) -> None:
    page, _ = made(tmp_path, classes=classes, label=label)
    refuse_foreign(page)
    if len(classes) == 1:
        assert "None: every first answer was right." in page.text


def drawn(classes: int, pictures: int, others: int = 0, seed: int = 0) -> tuple[np.ndarray, str]:
    """The matrix of random answers, and its drawing."""
    random = np.random.default_rng(seed)
    label = np.concatenate([np.arange(classes), random.integers(0, classes, pictures)])
    names = [f"<{n}>" for n in range(classes)]
    probability = softmax(random.normal(size=(len(label), classes + others)))
    labels = [*names[::-1], *(f"other {n}" for n in range(others))]
    target = top1.targets(names, labels)
    found = top1.assess(answers(probability).label, label, target, len(labels))
    asked, counts = confusion.matrix(found.confusion, found.target)
    plain = np.zeros((classes, classes + 1), np.int64)
    for kind, row in zip(label, probability, strict=True):
        answer = labels[int(row.argmax())]
        plain[kind, names.index(answer) if answer in names else classes] += 1
    np.testing.assert_array_equal(counts, plain if plain[:, -1].any() else plain[:, :-1])
    assert list(asked) == list(range(classes))
    return counts, confusion.drawing(counts, asked, names)


@pytest.mark.parametrize(("classes", "others"), [(1, 0), (3, 0), (9, 4), (12, 0), (30, 2), (31, 0), (100, 5)])
def test_the_drawing_is_svg_in_the_colours_of_the_page(classes: int, others: int) -> None:
    counts, svg = drawn(classes, 400, others)
    root = ElementTree.fromstring(svg)
    assert root.attrib.keys() == {"viewBox", "version"}
    assert "#0" not in svg
    assert {"var(--hit)", "var(--soft)", "var(--muted)"} <= set(re.findall(r"var\([^)]*\)", svg))
    texts = ["".join(each.itertext()).strip() for each in root.iter("{http://www.w3.org/2000/svg}text")]
    if classes <= confusion.NAMED:
        assert [texts.count(f"<{n}>") for n in range(classes)] == [2] * classes
    else:
        assert texts.count("1") == texts.count("10") == texts.count("30") == 2
    assert texts.count("other labels") == (counts.shape[1] > classes)
    if classes <= confusion.COUNTED:
        assert sorted(text for text in texts if text.isdigit()) == sorted(map(str, counts[counts > 0].tolist()))
    assert svg == drawn(classes, 400, others)[1]


def test_the_drawing_counts_classes_as_the_table_does() -> None:
    """Of 50 classes the first 9 have no pictures: the rows begin with number 10."""
    asked = np.arange(9, 50)
    texts = re.findall(r">(\d+)</text>", confusion.drawing(np.eye(41, dtype=np.int64), asked, [str(n) for n in range(50)]))
    assert sorted(set(texts)) == ["10", "19", "29", "39", "49"]


def test_the_drawing_stays_small() -> None:
    """100 classes and 10,000 pictures answered at random, the worst there is: 10,000 cells, 0.52 MB measured."""
    assert len(drawn(100, 10_000)[1]) < 700_000


def test_too_many_classes_are_not_drawn(tmp_path: Path) -> None:
    classes = [f"class {n}" for n in range(confusion.MOST + 1)]
    page, record = made(tmp_path, classes=classes, label=list(range(len(classes))))
    assert not page.of("svg")
    assert "101 classes are too many for a picture" in page.text
    assert len(record["classes"]) == 101


def test_one_report_at_a_time(run: ClassifyRun) -> None:
    refused(post("--recall", "--outputs", run.outputs), 2, "--recall and --top1")
    refused(post("--keys", "ascend", "--outputs", run.outputs), 2, "--keys", "--recall")
    refused(CliRunner().invoke(main, ["--outputs", str(run.outputs)]), 2, "Nothing was asked for", "--top1")


def test_outputs_of_the_other_task(run: ClassifyRun, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", own=(2,) * 4, k_test=3)
    out = ("--out", tmp_path / "report")
    refused(post("--outputs", other.outputs, *out), 1, "task 'retrieval'", "Use blip-post --recall")
    result = CliRunner().invoke(main, ["--recall", "--outputs", str(run.outputs), *map(str, out)])
    refused(result, 1, "task 'classify'", "Use blip-post --top1")
    features = make_classify_run(tmp_path / "features", outputs={"task": "features"})
    refused(post("--outputs", features.outputs, *out), 1, "task 'features'")
    refused(post("--outputs", run.outputs, "--data", other.data, *out), 1, "'retrieval'", "blip-pre classify")
    assert not (tmp_path / "report").exists()


def test_data_of_another_run_and_data_that_moved(run: ClassifyRun, tmp_path: Path) -> None:
    other, out = make_classify_run(tmp_path / "other", seed=1), tmp_path / "report"
    refused(post("--outputs", run.outputs, "--data", other.data, "--out", out), 1, "made from another data folder", "--data")
    moved = tmp_path / "elsewhere"
    run.data.rename(moved)
    refused(post("--outputs", run.outputs, "--out", out), 1, "there is no folder", "--data")
    assert post("--outputs", run.outputs, "--data", moved, "--out", out).exit_code == 0


def overwrite(run: ClassifyRun, change: Any) -> None:
    """Change the probabilities and complete the folder again, as a broken writer would."""
    found = manifest.read(run.outputs, "outputs")
    values = run.probability.copy()
    change(values)
    np.save(run.outputs / "probability.npy", values)
    manifest.write(run.outputs, "outputs", found.content)


def nan(values: np.ndarray) -> None:
    values[3, 2] = np.nan


def zero(values: np.ndarray) -> None:
    values[-1] = 0


@pytest.mark.parametrize(("change", "says"), [(nan, "1 of 420 values"), (zero, "probabilities of picture 59 add up to 0")])
def test_a_failure_leaves_the_older_report(run: ClassifyRun, tmp_path: Path, change: Any, says: str) -> None:
    out = tmp_path / "report"
    assert post("--outputs", run.outputs, "--out", out).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    overwrite(run, change)
    refused(post("--outputs", run.outputs, "--out", out), 1, says)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not list(tmp_path.glob(".*report*"))


@pytest.mark.parametrize(
    ("data", "outputs", "says"),
    [
        ({}, {"timings": None}, "lacks or garbles"),
        ({}, {"graphs": {}}, "Run blip-pre classify and blip-run classify again."),
        ({}, {"data": {}}, "does not say which data it was made from ('folder'). Run blip-run classify again."),
        ({}, {"labels": ["a cat"] * 7}, "a label is there twice"),
        ({}, {"labels": ["a cat"]}, "1 labels"),
        ({"protocol": {}}, {}, "lacks"),
        ({"images": [{}] * 60}, {}, "lacks"),
        ({"classes": ["a cat"]}, {}, "beyond"),
    ],
)
def test_manifests_that_lack_a_part(tmp_path: Path, data: dict[str, Any], outputs: dict[str, Any], says: str) -> None:
    run = make_classify_run(tmp_path, data=data, outputs=outputs)
    refused(post("--outputs", run.outputs, "--out", tmp_path / "report"), 1, says)
    assert not (tmp_path / "report").exists()


def test_outputs_that_do_not_say_what_was_asked(run: ClassifyRun, tmp_path: Path) -> None:
    content = manifest.read(run.outputs, "outputs").content
    for name in classify_report.ASKED:
        manifest.write(run.outputs, "outputs", {part: value for part, value in content.items() if part != name})
        refused(post("--outputs", run.outputs, "--out", tmp_path / "report"), 1, f"lacks or garbles '{name}'")


def test_outputs_of_another_size(tmp_path: Path) -> None:
    """A manifest made to fit by hand: the counts still tell."""
    run, other = make_classify_run(tmp_path / "a"), make_classify_run(tmp_path / "b", label=[0] * 9)
    content = manifest.read(run.outputs, "outputs").content
    content["data"] = {"digest": manifest.read(other.data, "data").digest, "folder": str(other.data)}
    manifest.write(run.outputs, "outputs", content)
    refused(post("--outputs", run.outputs, "--out", tmp_path / "report"), 1, "probabilities of 60 pictures, its data has 9")


def test_damaged_files(run: ClassifyRun, tmp_path: Path) -> None:
    path = run.outputs / "probability.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(post("--outputs", run.outputs, "--out", tmp_path / "report", "--verify"), 1, "probability.npy", "sha256 differs")
    os.truncate(path, 200)
    refused(post("--outputs", run.outputs, "--out", tmp_path / "report"), 1, "probability.npy has 200 bytes")
    refused(post("--outputs", tmp_path / "none", "--out", tmp_path / "report"), 1, "There is no folder", "blip-run")


def test_page_says_how_it_was_called(run: ClassifyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/blip-post", "--top1", "--verify"])
    assert post("--outputs", run.outputs, "--out", tmp_path / "report").exit_code == 0
    assert "<pre>blip-post --top1 --verify</pre>" in (tmp_path / "report/report.html").read_text("utf-8")
