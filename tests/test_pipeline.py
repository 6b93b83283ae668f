"""The Python interface against `blip-run` on the same pictures, what it takes for a picture, and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.errors import Misuse, UserError
from preprocess.dataset import read_classify as read_class_data
from preprocess.dataset import read_retrieval as read_data
from preprocess.images import read_image
from preprocess.text import CaptionTokenizer, pre_caption
from runtime import model as models
from runtime.labels import TEMPERATURE
from runtime.outputs import read_classify, read_retrieval, scores
from runtime.picture_input import read_pictures, to_rgb
from runtime.pipeline import TASKS, pipeline
from tests import chain
from tests.classes import MODELS, Work, blip2_graphs, data_for, theirs
from tests.independent import read_pictures as read_theirs
from tests.tiny import TINY, TINY2, random_blip2

# Measured: by blip-run the same bits; alone and in a batch 8.3e-7 at most; against the model itself 2.5e-6 (features, up to 4).
TOLERANCE = 1e-5
LABELS = ["word1", "word2 word3", "long1er1"]
TEXTS = ["word1 Word2.", "word3", "long1er1 word4 word5 word6", "word7; word8"]


@pytest.fixture(params=MODELS)
def work(request: pytest.FixtureRequest, ort_graphs: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Work:
    graphs = ort_graphs if request.param == "blip" else blip2_graphs(tmp_path_factory.getbasetemp())
    return Work(request.param, graphs, data_for(graphs), tmp_path)


@pytest.fixture
def blip2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blip2_graphs(tmp_path_factory.getbasetemp())


@pytest.fixture
def paths(ort_graphs: Path) -> list[Path]:
    """Pictures of several sizes."""
    return sorted((data_for(ort_graphs).parent / "images").rglob("*.png"))


def zero_shot(graphs: Path, **options: Any) -> Any:
    return pipeline("zero_shot_image_classification", graphs, threads=1, **{"temperature": TEMPERATURE, **options})


def table(found: list[list[dict[str, Any]]], labels: list[str]) -> np.ndarray:
    """(N, C): the scores in the order of the labels."""
    return np.array([[{entry["label"]: entry["score"] for entry in row}[label] for label in labels] for row in found])


def test_classification_equals_the_run(work: Work) -> None:
    work.run("--labels", ",".join(LABELS), "--template", "This is a photo of {}.")
    data, wanted = read_class_data(work.data), read_classify(work.out).probability[:]
    folder = Path(data.source.content["source"]["folder"])
    found = zero_shot(work.graphs, batchsize=7)([folder / image["image"] for image in data.images], LABELS)
    np.testing.assert_allclose(table(found, LABELS), wanted, atol=TOLERANCE)


def test_classification_as_hugging_face_does_it(work: Work) -> None:
    """Its scores for BLIP-2: the largest of the queries' similarities, and no temperature."""
    options: dict[str, Any] = {"query": "max"} if work.name == "blip2" else {}
    data = read_class_data(work.data)
    wanted = theirs(MODELS[work.name](), data, LABELS, ["This is a photo of {}."], 1.0, query="max")
    images = [Path(data.source.content["source"]["folder"]) / image["image"] for image in data.images]
    found = zero_shot(work.graphs, temperature=1.0, **options)(images, LABELS)
    np.testing.assert_allclose(table(found, LABELS), wanted, atol=TOLERANCE)


def test_form_of_a_classification(ort_graphs: Path, paths: list[Path]) -> None:
    classify = zero_shot(ort_graphs)
    one = classify(paths[0], candidate_labels=LABELS)
    assert [list(entry) for entry in one] == [["score", "label"]] * 3
    assert all(type(entry["score"]) is float for entry in one)
    assert [entry["score"] for entry in one] == sorted((entry["score"] for entry in one), reverse=True)
    assert sum(entry["score"] for entry in one) == pytest.approx(1, abs=1e-6)
    assert classify([paths[0]], candidate_labels=LABELS) == [one]
    assert classify([], candidate_labels=LABELS) == []
    assert classify(paths[0], candidate_labels=LABELS, top_k=2) == one[:2]
    assert classify(paths[0], candidate_labels=LABELS, top_k=99) == one
    assert classify(paths[0], candidate_labels="word1, word2 word3 ,long1er1") == one
    assert classify(paths[0], candidate_labels=tuple(LABELS), hypothesis_template="{} word9") != one
    assert classify(paths[0], candidate_labels=np.array(LABELS), top_k=np.int64(2)) == one[:2]


def test_defaults_of_calls(ort_graphs: Path, paths: list[Path]) -> None:
    plain = zero_shot(ort_graphs)
    given = zero_shot(ort_graphs, candidate_labels=LABELS, hypothesis_template="word9 {}")
    assert given(paths[:2]) == plain(paths[:2], LABELS, "word9 {}")
    assert given(paths[0], "word1,word4") == plain(paths[0], ["word1", "word4"], "word9 {}")
    several = ["word9 {}", "{}"]
    assert given(paths[0], hypothesis_template=several) == plain(paths[0], LABELS, several)
    with pytest.raises(Misuse, match="candidate_labels is None; give the labels"):
        plain(paths[0])


def test_labels_are_embedded_once(ort_graphs: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    classify = zero_shot(ort_graphs)
    first = classify(paths[0], LABELS)
    other = classify(paths[0], LABELS[:2])
    assert len(other) == 2
    assert classify(paths[0], LABELS) == first
    monkeypatch.setattr("runtime.pipeline.embed_labels", None)
    assert classify(paths[0], LABELS) == first


def test_a_guessed_temperature_is_said(ort_graphs: Path) -> None:
    with pytest.warns(UserWarning, match="These graphs hold no temperature") as said:
        pipeline("zero_shot_image_classification", ort_graphs)
    assert said[0].filename == __file__


@pytest.mark.parametrize("graphs", ["ort_graphs", "atc_graphs"])
def test_one_picture_as_in_a_batch(request: pytest.FixtureRequest, graphs: str, paths: list[Path]) -> None:
    folder = request.getfixturevalue(graphs)
    classify, match = zero_shot(folder, candidate_labels=LABELS), pipeline("image_text_retrieval", folder, threads=1)
    together, ranked = classify(paths), match(paths[:4], TEXTS)
    for path, row in zip(paths, together, strict=True):
        np.testing.assert_allclose(table([classify(path)], LABELS), table([row], LABELS), atol=TOLERANCE)
    for path, row in zip(paths, ranked, strict=False):
        for alone, entry in zip(match(path, TEXTS), row, strict=True):
            assert alone == pytest.approx(entry, abs=TOLERANCE)


def test_retrieval_equals_the_run(work: Work, tmp_path: Path) -> None:
    data = chain.prepare(tmp_path, work.graphs, own=(1, 3, 2, 5, 1))
    chain.done(chain.run(work.graphs, data, tmp_path / "outputs", "--k-test", 99))
    made, wanted = read_data(data), read_retrieval(tmp_path / "outputs")
    score, logits = scores(wanted), wanted.itm_logits[:]
    chance = np.exp(logits[:, 1]) / np.exp(logits).sum(axis=1)
    images = [str(tmp_path / "images" / image["image"]) for image in made.images]
    found = pipeline("image-text-retrieval", work.graphs, threads=1, batchsize=4)(images, made.captions)
    assert [list(entry) for entry in found[0]] == [["text", "score", "similarity", "itm"]] * len(made.captions)
    for image, row in enumerate(found):
        assert [entry["score"] for entry in row] == sorted((entry["score"] for entry in row), reverse=True)
        of_text = {entry["text"]: entry for entry in row}
        for n in np.flatnonzero(wanted.pair_image[:] == image):
            entry = of_text[made.captions[wanted.pair_text[n]]]
            assert entry["score"] == pytest.approx(score[n], abs=TOLERANCE)
            assert entry["similarity"] == pytest.approx(wanted.pair_sim[n], abs=TOLERANCE)
            assert entry["itm"] == pytest.approx(chance[n], abs=TOLERANCE)


def test_form_of_a_retrieval(ort_graphs: Path, paths: list[Path], tmp_path: Path) -> None:
    rank = pipeline("image_text_retrieval", ort_graphs, threads=1)
    one = rank(paths[0], TEXTS)
    assert rank([paths[0]], TEXTS) == [one]
    assert rank([], TEXTS) == []
    assert rank(paths[0], []) == []
    assert rank(paths[:2], []) == [[], []]
    assert rank(paths[0], TEXTS[0]) == rank(paths[0], TEXTS[:1])
    assert rank(paths[0], TEXTS[0])[0] == pytest.approx(next(e for e in one if e["text"] == TEXTS[0]), abs=TOLERANCE)
    by_similarity = rank(paths[0], TEXTS, match=False)
    assert all(entry["score"] == entry["similarity"] and "itm" not in entry for entry in by_similarity)
    similar = {entry["text"]: entry["similarity"] for entry in one}
    assert {entry["text"]: entry["similarity"] for entry in by_similarity} == pytest.approx(similar, abs=TOLERANCE)
    cheap = chain.with_only(ort_graphs, tmp_path / "cheap", "text_embed", "image_embed")
    assert pipeline("image_text_retrieval", cheap, threads=1)(paths[0], TEXTS, match=False) == by_similarity
    per_pair = chain.with_only(ort_graphs, tmp_path / "pairs", "text_embed", "image_embed", "image_feat", "itm")
    for found, entry in zip(pipeline("image_text_retrieval", per_pair, threads=1)(paths[0], TEXTS), one, strict=True):
        assert found == pytest.approx(entry, abs=TOLERANCE)


@torch.no_grad()
def features(mode: str, paths: list[Path], texts: list[str], vocabulary: Path) -> dict[str, torch.Tensor]:
    """What the model itself says, the texts padded to the longest."""
    model, tokenizer = random_blip2(), CaptionTokenizer.load(vocabulary, TINY2)
    ids, mask = map(torch.from_numpy, tokenizer.encode([pre_caption(text, 50) for text in texts], 35))
    ids, mask = ids[:, : mask.sum(1).max()], mask[:, : mask.sum(1).max()]
    feat = model.image_feat(read_theirs(paths, TINY2.vision.image_size))
    if mode == "image":
        queries = model.query_embed(feat)
        return {"image_embeds": queries, "image_embeds_proj": model.image_embed(queries)}
    if mode == "text":
        words = model.text_feat(ids, mask)
        return {"text_embeds": words * mask[:, :, None], "text_embeds_proj": model.text_feat_proj(words) * mask[:, :, None]}
    return {"multimodal_embeds": model.multimodal_embed(ids, mask, model.keys_values(feat))}


@pytest.mark.parametrize("mode", ["image", "text", "multimodal"])
def test_features_equal_the_model(blip2: Path, paths: list[Path], mode: str) -> None:
    describe = pipeline("feature-extraction", blip2, threads=1, batchsize=3)
    found = describe(paths[:4], TEXTS, mode)
    wanted = features(mode, paths[:4], TEXTS, blip2.parent / "model" / "vocab.txt")
    assert list(found) == list(wanted)
    for name, rows in wanted.items():
        assert found[name].dtype == np.float32
        assert found[name].shape == tuple(rows.shape)
        np.testing.assert_allclose(found[name], rows.numpy(), atol=TOLERANCE)
    one = describe(paths[0], TEXTS[0], mode)
    for name, rows in one.items():
        assert len(rows) == 1
        np.testing.assert_allclose(rows[0], found[name][0, : rows.shape[1]], atol=TOLERANCE)
    assert all(len(rows) == 0 for rows in describe([], [], mode).values())


def test_features_equal_the_run(blip2: Path, tmp_path: Path) -> None:
    data = chain.prepare(tmp_path, blip2, own=(1, 1, 1, 1, 1))
    chain.done(chain.run(blip2, data, tmp_path / "outputs", task="features"))
    made, describe = read_data(data), pipeline("feature_extraction", blip2, threads=1)
    images = [tmp_path / "images" / image["image"] for image in made.images]
    for mode in ("image", "text", "multimodal"):
        for name, rows in describe(images, made.captions, mode).items():
            wanted = np.load(tmp_path / "outputs" / f"{name}.npy")
            length = rows.shape[1]
            np.testing.assert_allclose(rows, wanted[:, :length], atol=TOLERANCE)
            assert not wanted[:, length:].any()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mode": "images"}, "There is no mode 'images'; known modes: image, text, multimodal."),
        ({"texts": "word1", "mode": "image"}, "The mode 'image' needs images; "),
        ({"mode": "text"}, "The mode 'text' needs texts; "),
        ({"texts": ["word1"]}, "The mode 'multimodal' needs images and texts; "),
        ({"images": [], "texts": ["word1"]}, "0 pictures and 1 texts; each picture goes with one text."),
        ({"texts": [1], "mode": "text"}, "Text 0 is 1, of type int; expected a str."),
        ({"texts": ["word1", "\ud800"], "mode": "text"}, "Text 1 is '\\ud800', of type str; "),
    ],
)
def test_features_refused(blip2: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(Misuse, match=re.escape(said)):
        pipeline("feature_extraction", blip2)(**given)


def test_features_of_blip(ort_graphs: Path) -> None:
    with pytest.raises(UserError, match="holds graphs of BLIP, but features are of BLIP-2"):
        pipeline("feature_extraction", ort_graphs)


def random_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "I;16"])
def test_what_a_picture_may_be(tmp_path: Path, mode: str) -> None:
    """A path, the PIL image at it, opened or loaded, and its array give the same pixels as blip-pre reads."""
    image = Image.fromarray(random_pixels(23, 37, 4), "RGBA" if mode == "RGBA" else None)
    image = Image.fromarray(random_pixels(23, 37).astype(np.uint16) * 200) if mode == "I;16" else image.convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    wanted = read_image(path, TINY.vision.image_size, "bicubic")
    given: list[Any] = [path, str(path), Image.open(path), image]
    if mode in ("RGB", "L", "RGBA"):
        given.append(np.asarray(image))
        given.append(np.asarray(image)[::1, ::1].copy(order="F"))
    for picture in given:
        np.testing.assert_array_equal(to_square(picture), wanted)
    table = read_pictures(given, 0, TINY)
    assert table.shape == (len(given), 3, TINY.vision.image_size, TINY.vision.image_size)
    assert table.dtype == np.float32
    assert (table == table[0]).all()


def to_square(picture: Any) -> np.ndarray:
    size = TINY.vision.image_size
    return np.asarray(to_rgb(picture).resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def test_rotation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lie on the side
    Image.fromarray(random_pixels(20, 40, 3)).save(tmp_path / "a.jpg", exif=exif)
    assert to_rgb(tmp_path / "a.jpg").size == to_rgb(Image.open(tmp_path / "a.jpg")).size == (40, 20)


def test_a_mixed_list(ort_graphs: Path, paths: list[Path]) -> None:
    classify = zero_shot(ort_graphs, candidate_labels=LABELS)
    mixed = (str(paths[0]), paths[1], Image.open(paths[2]), np.asarray(Image.open(paths[3])))
    assert classify(mixed) == classify(paths[:4])


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        ("https://example.org/a.jpg", "https://example.org/a.jpg is an address, and nothing here reads the network. Save "),
        ("file:///a.jpg", "is an address"),
        ("nowhere.png", "nowhere.png does not exist."),
        (Path("nowhere.png"), "nowhere.png does not exist."),
        (None, "Picture 0 is of type NoneType; expected a path, a PIL image or a numpy array."),
        (b"a.png", "Picture 0 is of type bytes; "),
        (torch.zeros(3, 4, 4), "Picture 0 is of type Tensor; "),
        ([["a.png"]], "Picture 0 is of type list; "),
        ([random_pixels(4, 4, 3), 7], "Picture 1 is of type int; "),
        (random_pixels(4, 4, 3).astype(np.float32), "Picture 0 is an array float32 (4, 4, 3); expected uint8 of shape "),
        (random_pixels(2, 4, 4, 3), "Picture 0 is an array uint8 (2, 4, 4, 3); "),
        (random_pixels(3, 4, 5), "Picture 0 is an array uint8 (3, 4, 5); "),
        (random_pixels(0, 4, 3), "Picture 0 has no pixels: its shape is (0, 4, 3)."),
        (Image.new("RGB", (0, 4)), "Picture 0 has no pixels: its size is 0 x 4."),
    ],
    ids=lambda each: None if isinstance(each, str) else type(each).__name__,
)
def test_what_is_no_picture(ort_graphs: Path, picture: Any, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        zero_shot(ort_graphs)(picture, LABELS)


def test_broken_pictures(ort_graphs: Path, paths: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    Image.fromarray(random_pixels(60, 60, 3)).save(broken)
    broken.write_bytes(broken.read_bytes()[:900])
    classify = zero_shot(ort_graphs, candidate_labels=LABELS)
    with pytest.raises(UserError, match=re.escape(f"{broken} cannot be decoded: ")):
        classify([paths[0], broken])
    with pytest.raises(UserError, match="Picture 1 cannot be decoded: "), Image.open(broken) as opened:
        classify([paths[0], opened])
    closed = Image.open(paths[0])
    closed.close()
    with pytest.raises(UserError, match="Picture 0 cannot be decoded: "):
        classify(closed)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda g: pipeline("zero_shot", g), f"There is no task 'zero_shot'; known tasks: {', '.join(TASKS)}."),
        (
            lambda g: pipeline("feature_extraction", g, provider="tpu"),
            "There is no provider 'tpu'; known providers: cpu, ",
        ),
        (lambda g: pipeline("image_text_retrieval", g, batchsize=0), "batchsize is 0; expected a whole number above 0."),
        (lambda g: pipeline("image_text_retrieval", g, threads=0), "threads is 0; expected a whole number above 0."),
        (lambda g: pipeline("image_text_retrieval", g, batchsize=2.5), "batchsize is 2.5; expected a whole number above 0."),
        (lambda g: pipeline("image_text_retrieval", g, threads="2"), "threads is '2'; expected a whole number above 0."),
        (lambda g: pipeline(None, g), "There is no task None; known tasks: "),  # type: ignore[arg-type]
        (lambda g: pipeline("image_text_retrieval", None), "graphs is None; expected the path of a folder "),  # type: ignore[arg-type]
        (lambda g: zero_shot(g, temperature="0.1"), "The temperature is '0.1'; expected a number above 0."),
        (lambda g: zero_shot(g, temperature=0.0), "The temperature is 0.0; expected a number above 0."),
        (lambda g: zero_shot(g, query="max"), "The query 'max' was asked for, but these graphs are of BLIP"),
        (lambda g: zero_shot(g, query="mean"), "There is no query 'mean'; expected 'first' or 'max'."),
        (lambda g: zero_shot(g)([], LABELS, top_k=0), "top_k is 0; expected a whole number above 0"),
        (lambda g: zero_shot(g)([], LABELS, top_k=1.5), "top_k is 1.5; expected a whole number above 0"),
        (lambda g: zero_shot(g)([], LABELS, top_k="1"), "top_k is '1'; expected a whole number above 0"),
        (lambda g: zero_shot(g)([], 5), "candidate_labels is 5; expected several texts, or one with commas between."),
        (lambda g: zero_shot(g)([], np.array("a")), "candidate_labels is array('a'"),
        (lambda g: zero_shot(g)([], np.array([["a"]])), "Label 1 is array(['a']"),
        (lambda g: zero_shot(g)([], np.array([])), "The list of labels is empty; "),
        (lambda g: zero_shot(g)([], []), "The list of labels is empty; "),
        (lambda g: zero_shot(g)([], ["a", "a"]), "Label 2 is 'a', as 1 is; "),
        (lambda g: zero_shot(g)([], "a,,b"), "Label 2 is blank; "),
        (lambda g: zero_shot(g)([], LABELS, "a photo"), "The template 'a photo' must hold one {}"),
        (lambda g: zero_shot(g)([], LABELS, []), "There is no template; "),
        (lambda g: zero_shot(g)([], LABELS, [None]), "The template None must hold one {}"),
        (lambda g: pipeline("image_text_retrieval", g)([], [None]), "Text 0 is None, of type NoneType; expected a str."),
        (lambda g: pipeline("image_text_retrieval", g)([], ["word1", ""]), "Text 1 is '', which has no words; leave it out."),
        (lambda g: pipeline("image_text_retrieval", g)([], "\t... !"), "Text 0 is '\\t... !', which has no words; "),
    ],
)
def test_misuse(ort_graphs: Path, call: Callable[[Path], Any], said: str) -> None:
    with pytest.raises(Misuse, match=re.escape(said)):
        call(ort_graphs)


def test_graphs_and_providers_that_are_not_there(ort_graphs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no folder"):
        pipeline("image_text_retrieval", tmp_path / "none")
    with pytest.raises(UserError, match="CUDAExecutionProvider"):
        pipeline("image_text_retrieval", ort_graphs, provider="cuda")
    part = chain.with_only(ort_graphs, tmp_path / "part", "text_embed", "image_embed")
    with pytest.raises(UserError, match=re.escape("has no graph 'image'. Export it: blip-export --graphs image ...")):
        pipeline("image_text_retrieval", part)([], TEXTS)
    with pytest.raises(TypeError, match="colour"):
        pipeline("image_text_retrieval", ort_graphs, colour="red")


def test_graphs_are_loaded_once_and_late(ort_graphs: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = models.open_session

    def counted(graphs: Any, name: str, *others: Any) -> Any:
        opened.append(name)
        return real(graphs, name, *others)

    monkeypatch.setattr(models, "open_session", counted)
    rank = pipeline("image_text_retrieval", ort_graphs, threads=1)
    assert opened == []
    rank(paths[0], TEXTS, match=False)
    assert opened == ["text_embed", "image_embed"]
    for _ in range(2):
        rank(paths[0], TEXTS)
    assert opened == ["text_embed", "image_embed", "image", "image_kv", "itm_cached"]


def test_no_torch_is_needed(ort_graphs: Path, paths: list[Path]) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from runtime.pipeline import pipeline\n"
        "graphs, picture = sys.argv[1:]\n"
        "classify = pipeline('zero-shot-image-classification', graphs, temperature=0.07)\n"
        "assert len(classify(picture, candidate_labels='word1,word2')) == 2\n"
        "assert len(pipeline('image_text_retrieval', graphs)(picture, ['word1'])) == 1\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, ort_graphs, paths[0]], cwd=Path(__file__).parent.parent, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


def test_nan_is_refused(ort_graphs: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    nan = np.full((1, 3, 32, 32), np.nan, np.float32)
    monkeypatch.setattr(models, "read_pictures", lambda *args: nan)
    with pytest.raises(UserError, match="The graph gave NaN or infinity in "):
        zero_shot(ort_graphs)(paths[0], LABELS)


def test_pictures_and_texts_matter(work: Work, paths: list[Path]) -> None:
    """Equality would say little otherwise: another picture, or another template, moves scores by more than the tolerance."""
    classify = zero_shot(work.graphs, candidate_labels=LABELS)
    first, second = table(classify(paths[:2]), LABELS)
    assert np.abs(first - second).max() > 100 * TOLERANCE
    assert np.abs(first - table([classify(paths[0], hypothesis_template="{}")], LABELS)).max() > 100 * TOLERANCE
    one, other = pipeline("image_text_retrieval", work.graphs, threads=1)(paths[:2], TEXTS)
    logits = [{entry["text"]: entry["score"] - entry["similarity"] for entry in row} for row in (one, other)]
    assert max(abs(logits[0][text] - logits[1][text]) for text in TEXTS) > 100 * TOLERANCE


def test_every_task_has_an_example() -> None:
    for task, made in TASKS.items():
        assert f'pipeline("{task}"' in str(made.__doc__)
