"""The report's page and record: self-contained, safe whatever the captions say, bounded, and true to the tensors."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from models.manifest import Manifest
from postprocess import charts, gallery, recall, report
from postprocess.gallery import HITS, MISSES, Pictures, card
from preprocess.dataset import RetrievalData
from tests.retrieval_run import CONFIG, make_run
from tests.test_recall import dense_pairs, random_run

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=http://evil.example/x.png onerror=alert(1)>',
    "{{ 7 * 7 }} {% for x in y %}",
    "<style>body{display:none}</style></p></article>",
    "' onmouseover='alert(1)",
    "&lt;b&gt; & ]]> <!-- ",
    "half a pair \ud83d, a cat 🐱, 一只猫, قطة",
    "many " * 10_000,
)


class Page(HTMLParser):
    """Every element and its attributes, and the text between them. Each element must be closed where it belongs."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.inside: list[str] = []
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        assert not self.inside

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def made(root: Path, **parts: Any) -> tuple[Page, dict[str, Any]]:
    run = make_run(root, **parts)
    written = report.write(run.outputs, None, root / "report")
    return Page(written.page), json.loads((root / "report/report.json").read_text("utf-8"))


def refuse_foreign(page: Page) -> None:
    """Nothing is loaded, nothing runs."""
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "embed", "form", "base", "video"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                assert value is not None
                assert value.startswith("data:image/" if name == "src" else "#"), (tag, name, value)
    styles = " ".join(re.findall(r"<style>.*?</style>", page.source, re.DOTALL)) + " ".join(
        a.get("style") or "" for _, a in page.elements
    )
    assert "url(" not in styles
    assert "@import" not in styles
    (policy,) = [a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_page_stands_alone(tmp_path: Path) -> None:
    page, _ = made(tmp_path)
    refuse_foreign(page)
    addresses = set(re.findall(r"https?://[^\s\"'<]+", page.source))
    assert addresses == {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}  # names of XML, never fetched


def test_the_check_for_foreign_content_can_fail(tmp_path: Path) -> None:
    page, _ = made(tmp_path)
    for harm in (
        "<script>1</script>",
        '<img src="http://evil.example/x.png">',
        "<p onclick='x()'>",
        "<style>a{b:url(x)}</style>",
    ):
        (tmp_path / "harmed.html").write_text(page.source.replace("</main>", harm + "</main>"), "utf-8")
        with pytest.raises(AssertionError):
            refuse_foreign(Page(tmp_path / "harmed.html"))


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    """In captions, paths, reasons, the model's name: they are shown, they never become elements."""
    safe = [text.encode("utf-8", "replace").decode("utf-8") for text in HOSTILE]
    captions = (safe * 10)[:70]
    images = [{"image": f"{safe[n % 6]}/{n}.jpg", "width": 60, "height": 40} for n in range(14)]
    broken = [{"image": text, "entry": n, "reason": text} for n, text in enumerate(safe)]
    page, record = made(tmp_path, captions=captions, data={"images": images, "broken": broken})
    refuse_foreign(page)
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "many many" in page.text
    assert len(page.source) < 1_000_000  # ten thousand words are cut
    assert record["left_out"] == broken


def test_half_a_surrogate_pair_does_not_stop_the_report(tmp_path: Path) -> None:
    run = make_run(tmp_path, captions=["CUT" for _ in range(70)])
    path = run.data / "manifest.json"
    path.write_text(path.read_text("utf-8").replace('"CUT"', '"CUT \\ud83d"'), "ascii")
    found = json.loads((run.outputs / "manifest.json").read_text("utf-8"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Manifest, "digest", found["data"]["digest"])
        page = Page(report.write(run.outputs, None, tmp_path / "report").page)
    assert "CUT ?" in page.text


def test_gallery_is_bounded_and_spread(tmp_path: Path) -> None:
    page, _ = made(tmp_path, own=(3,) * 60, seed=4)
    for kind, bound in (("card pair hit", HITS), ("card pair miss", MISSES), ("card ask hit", HITS), ("card ask miss", MISSES)):
        assert [a.get("class") for a in page.of("article")].count(kind) == bound
    assert len(page.of("img")) == HITS + MISSES + HITS + 2 * MISSES
    outputs, image_of_text = random_run(np.random.default_rng(2), None)
    rank = recall.assess(outputs, image_of_text)
    shown = gallery.gallery(rank.pairs_t2i, rank.reranked.img, rank.itc.img)
    queries = [each.query for each in shown.misses]
    missed = np.flatnonzero(rank.reranked.img > 0)
    assert (queries[0], queries[-1], shown.all_misses) == (missed[0], missed[-1], len(missed))
    assert queries == sorted(set(queries))


@pytest.mark.parametrize("seed", range(8))
def test_cards_agree_with_the_ranks(seed: int) -> None:
    """Two ways to the same order: the card sorts a list, `ranks` counts what is ahead. Half of the runs have ties."""
    outputs, image_of_text = random_run(np.random.default_rng(seed), 4, levels=seed % 2 or None)
    found = recall.assess(outputs, image_of_text)
    for pairs, rank in ((found.pairs_i2t, found.reranked.txt), (found.pairs_t2i, found.reranked.img)):
        for query, expected in enumerate(rank.tolist()):
            made_card = card(pairs, query, 0)
            if expected == recall.NOT_FOUND:
                assert made_card.answer is None
            else:
                assert made_card.answer is not None
                assert made_card.answer.rank == expected + 1
                assert made_card.answer.right
            assert made_card.hit == (expected == 0)
            scores = [candidate.score for candidate in made_card.top]
            assert scores == sorted(scores, reverse=True)


def test_a_card_says_what_was_first_and_where_the_right_one_came() -> None:
    pairs = dense_pairs(np.array([[0.1, 0.9, 0.5, 0.7, 0.6]]), np.array([2]), np.array([0, 1, 2, 3, 4]))
    found = card(pairs, 0, 6)
    assert [(c.item, c.rank, c.right) for c in found.top] == [(1, 1, False), (3, 2, False), (4, 3, False)]
    assert found.answer is not None
    assert (found.answer.item, found.answer.rank, found.candidates, found.itc_rank) == (2, 4, 5, 7)


def pictures(pixels: np.ndarray) -> Pictures:
    """Of one picture (S, S, 3) uint8."""
    mean, std = (np.array(v, np.float32) for v in (CONFIG.protocol.mean, CONFIG.protocol.std))
    img = ((pixels.astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)[None]
    protocol = {"mean": CONFIG.protocol.mean, "std": CONFIG.protocol.std}
    record = [{"image": "a.jpg", "width": 30, "height": 40}]
    none = np.zeros((0,), np.int64)
    return Pictures(RetrievalData(Manifest(Path("data"), "data", {}, {}, {}), protocol, record, [], none, [], img, none, none))


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_small_pictures_are_shown_bit_for_bit() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    uri = pictures(pixels)(0)["uri"]
    assert uri.startswith("data:image/png;base64,")
    np.testing.assert_array_equal(decoded(uri), pixels)


def test_large_pictures_are_shown_small() -> None:
    ramp = np.linspace(0, 255, 384).astype(np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(90)), 2)
    made_picture = pictures(pixels)(0)
    assert (made_picture["width"], made_picture["height"]) == (30, 40)
    shown = decoded(made_picture["uri"])
    assert shown.shape == (gallery.PIXELS, gallery.PIXELS, 3)
    want = np.asarray(Image.fromarray(pixels).resize(shown.shape[:2]))
    # A smooth picture through JPEG at quality 82: at most 4 levels off, measured.
    assert np.abs(shown.astype(int) - want).max() <= 8


def test_the_page_stays_small_whatever_the_pictures() -> None:
    """Noise is the worst a picture can be: 52 of them are 3.2 MB; the words and charts of a page are some 0.1 MB."""
    noise = np.random.default_rng(0).integers(0, 256, (384, 384, 3), dtype=np.uint8)
    assert (HITS + MISSES + HITS + 2 * MISSES) * len(pictures(noise)(0)["uri"]) < 5_000_000


def test_pictures_keep_their_shape(tmp_path: Path) -> None:
    page, _ = made(tmp_path)
    ratios = [re.fullmatch(r"aspect-ratio: (\d+) / 40", a["style"] or "") for a in page.of("img")]
    assert all(match and 60 <= int(match[1]) < 74 for match in ratios)
    assert {a["style"] for a in page.of("div") if a.get("class") == "frame"} == {"aspect-ratio: 4 / 3"}


def test_square_pictures_have_square_frames(tmp_path: Path) -> None:
    page, _ = made(tmp_path, data={"images": [{"image": f"{n}.png", "width": 64, "height": 64} for n in range(14)]})
    assert {a["style"] for a in page.of("div") if a.get("class") == "frame"} == {"aspect-ratio: 1 / 1"}


def test_numbers_on_the_page_are_those_of_the_record(tmp_path: Path) -> None:
    page, record = made(tmp_path)
    cells = re.findall(r"<td>([\d.]+)</td>", page.source)
    wanted = [
        f"{record['metrics'][method][f'{side}_{part}']:.2f}"
        for side in ("txt", "img")
        for method in ("reranked", "itc", "chance")
        for part in ("r1", "r5", "r10", "r_mean")
    ]
    assert cells == wanted
    assert record["counts"]["pictures"] == 14
    assert record["curves"]["itc"]["txt"][9] == record["metrics"]["itc"]["txt_r10"]
    assert [len(record["curves"]["itc"][side]) for side in ("txt", "img")] == [50, 14]
    assert [len(record["curves"]["reranked"][side]) for side in ("txt", "img")] == [12, 12]
    assert record["protocol"]["tokenizer_sha256"] == "0" * 64
    for text in ("1.5e-06", "28.0", "itm_cached", "weights.safetensors", record["data"]["digest"], record["outputs"]["digest"]):
        assert text in page.text  # parity, 14 pictures in half a second, graphs, identity


def test_departures_from_the_protocol_are_said(tmp_path: Path) -> None:
    plain, record = made(tmp_path / "plain")
    assert record["deviations"] == []
    assert 'class="notes"' not in plain.source
    run = make_run(tmp_path / "probe")
    protocol = json.loads((run.data / "manifest.json").read_text("utf-8"))["protocol"]
    page, record = made(tmp_path / "bent", k_test=5, data={"protocol": {**protocol, "interpolation": "bilinear"}})
    assert [one["name"] for one in record["deviations"]] == ["interpolation", "k_test"]
    assert "interpolation bilinear" in page.text
    assert "With k_test 5" in page.text


def test_a_k_test_larger_than_the_set_is_no_departure(tmp_path: Path) -> None:
    _, record = made(tmp_path, own=(2,) * 3, k_test=6)
    assert record["deviations"] == []


def test_left_out_samples_are_listed(tmp_path: Path) -> None:
    broken = [{"image": f"gone{n}.jpg", "entry": n, "reason": "does not exist"} for n in range(report.LISTED + 7)]
    page, record = made(tmp_path, data={"broken": broken})
    assert "57 broken samples" in page.text
    assert "the first 50; report.json has them all" in page.text
    assert f"gone{report.LISTED - 1}.jpg" in page.text
    assert f"gone{report.LISTED}.jpg" not in page.text
    assert record["left_out"] == broken


def test_pictures_without_captions_are_said(tmp_path: Path) -> None:
    page, record = made(tmp_path, own=(3, 0, 2, 4, 0, 1, 2))
    assert record["counts"]["without_captions"] == 2
    assert "2 pictures without captions" in page.text


@pytest.mark.parametrize(("own", "k_test"), [((1,), 1), ((1, 1), 1), ((4, 1), 3)])
def test_the_smallest_sets_have_a_report_too(tmp_path: Path, own: tuple[int, ...], k_test: int) -> None:
    page, _ = made(tmp_path, own=own, k_test=k_test)
    refuse_foreign(page)
    if own == (1,):
        assert "None: every first answer was right." in page.text


def test_curves_are_svg_in_the_colours_of_the_page() -> None:
    itc = np.linspace(40, 99, 50).tolist()
    svg = charts.recall_curves([70.0, 80.0, 90.0], itc)
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.attrib.keys() == {"viewBox", "version"}
    for variable in charts.PAGE.values():
        assert variable in svg
    assert not re.search(r"#0[1-4]0|<metadata|<style|<g id", svg)
    assert "10" in "".join(root.itertext())
    assert svg == charts.recall_curves([70.0, 80.0, 90.0], itc)
    assert svg != charts.recall_curves([70.0, 80.0, 91.0], itc)
