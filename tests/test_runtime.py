"""blip-run over graphs/ and data/: what it refuses, what it says, how much it reads at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tqdm import tqdm

from models import manifest
from models.errors import UserError
from models.spec import GraphSpec, TensorSpec
from preprocess.dataset import read_retrieval as read_data
from runtime.embed import image_work, refuse_nan, text_work
from runtime.graphs import read_graphs
from runtime.outputs import read_retrieval
from runtime.plan import Plan
from runtime.rerank import itm_ids, pair_shards, pair_work, score_picture
from tests import chain
from tests.tiny import TINY

K = 11


class Recorded:
    """A tensor whose every read is counted: the largest number of rows asked for at once, and each row read."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.shape, self.dtype = rows, rows.shape, rows.dtype
        self.largest = 0
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        chosen = np.atleast_1d(np.arange(len(self))[index])
        self.largest = max(self.largest, len(chosen))
        self.read += chosen.tolist()
        found: np.ndarray = self.rows[index]
        return found

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise AssertionError("the whole tensor was asked for")


class FakeSession:
    """Gives each row a number that tells which row it was: the one at `tells` of its first input."""

    def __init__(self, output: str, batch: int | None = None, tells: int = -1, takes: str = "input_image") -> None:
        self.tells = tells
        self.output, self.batch, self.sizes = output, batch, list[int]()
        self.spec = GraphSpec(output, (TensorSpec(takes, "float32", ()),), (TensorSpec(output, "float32", ("B", 2)),))

    def run(self, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        if self.output == "cross_kv":
            return {"cross_kv": feeds["image_feat"]}
        first = next(iter(feeds.values()))
        self.sizes.append(len(first))
        values = first.reshape(len(first), -1)[:, self.tells].astype(np.float32)
        if "cross_kv" in feeds:
            values = values + 1000 * float(feeds["cross_kv"].flat[0])
        return {self.output: np.stack([values, -values], axis=1)}


class Written:
    """A writer that keeps everything."""

    def __init__(self, rows: int) -> None:
        self.rows = np.full((rows, 2), np.nan, np.float32)
        self.shape, self.dtype = self.rows.shape, self.rows.dtype

    def write(self, start: int, rows: np.ndarray) -> None:
        self.rows[start : start + len(rows)] = rows


def quiet() -> tqdm[Any]:
    return tqdm(disable=True)


def fake_data(pictures: int, captions: int) -> Any:
    """Pictures that hold their number in the last pixel, captions that hold theirs in the last id."""
    img = np.zeros((pictures, 3, 2, 2), np.float32)
    img[:, -1, -1, -1] = np.arange(pictures)
    ids = np.zeros((captions, 4), np.int64)
    ids[:, -1] = np.arange(captions)
    mask = np.ones((captions, 4), np.int64)
    return SimpleNamespace(img=Recorded(img), ids=ids, mask=mask, encode_id=9, captions=[""] * captions)


def test_pictures_are_read_batch_by_batch() -> None:
    data, writer, session = fake_data(50, 1), Written(50), FakeSession("image_embed")
    work = image_work(data, [session], 4, {"image_embed": writer})  # type: ignore[list-item,dict-item]
    for start, stop in ((0, 20), (20, 50)):
        work(start, stop, quiet())
    np.testing.assert_array_equal(writer.rows[:, 0], np.arange(50))
    assert data.img.largest == 4
    assert data.img.read == list(range(50))
    assert max(session.sizes) == 4


class Step(FakeSession):
    """Adds its own number to each row of what it takes."""

    def __init__(self, takes: str, gives: str, adds: int, batch: int | None = None) -> None:
        super().__init__(gives, batch, takes=takes)
        self.takes, self.adds = takes, adds

    def run(self, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        self.sizes.append(len(feeds[self.takes]))
        values = feeds[self.takes].reshape(len(feeds[self.takes]), -1)[:, -1:]
        return {self.output: np.repeat(values + self.adds, 2, axis=1), "unasked": values}


def test_a_graph_is_fed_what_one_before_it_gave() -> None:
    """BLIP's two encoders both take the picture; BLIP-2's Q-Former takes the features. What nobody writes is dropped."""
    chains = [
        (Step("input_image", "image_embed", 100), Step("input_image", "image_feat", 200)),
        (Step("input_image", "image_feat", 200), Step("image_feat", "image_embed", -100, batch=3)),
    ]
    for steps in chains:
        data, writers = fake_data(10, 1), {"image_embed": Written(10), "image_feat": Written(10)}
        image_work(data, list(steps), 4, writers)(0, 10, quiet())  # type: ignore[arg-type]
        np.testing.assert_array_equal(writers["image_embed"].rows[:, 0], np.arange(10) + 100)
        np.testing.assert_array_equal(writers["image_feat"].rows[:, 0], np.arange(10) + 200)
        assert steps[0].sizes == steps[1].sizes == ([4, 4, 2] if steps[1].batch is None else [3, 3, 3, 1])


def test_a_static_batch_is_used_whole() -> None:
    data, writer, session = fake_data(10, 1), Written(10), FakeSession("image_embed", batch=3)
    image_work(data, [session], 16, {"image_embed": writer})(0, 10, quiet())  # type: ignore[list-item,dict-item]
    assert session.sizes == [3, 3, 3, 1]


def test_captions_come_back_in_order() -> None:
    data, writer, session = fake_data(1, 23), Written(23), FakeSession("text_embed", tells=0)
    data.mask[::2, 3:] = 0
    data.ids[:, 0] = data.ids[:, -1]
    work = text_work(data, session, 5, writer)  # type: ignore[arg-type]
    work(0, 9, quiet())
    work(9, 23, quiet())
    np.testing.assert_array_equal(writer.rows[:, 0], np.arange(23))
    assert max(session.sizes) == 5


def a_plan(seed: int, pictures: int, captions: int) -> Plan:
    chosen = np.random.default_rng(seed).random((pictures, captions)) < 0.3
    chosen[3] = False  # a picture that nobody wants
    image, text = np.nonzero(chosen)
    return Plan(image.astype(np.int32), text.astype(np.int32), np.ones(len(image), np.uint8), np.zeros(len(image), np.float32))


def test_features_are_read_one_picture_at_a_time() -> None:
    """And each one once; every logit lands at its own pair."""
    data, plan = fake_data(12, 30), a_plan(0, 12, 30)
    feats = Recorded(np.arange(12, dtype=np.float32).reshape(12, 1, 1))
    writer, sessions = Written(len(plan.image)), [FakeSession("cross_kv"), FakeSession("itm_logits")]
    work = pair_work(data, feats, plan, sessions, 4, writer)  # type: ignore[arg-type]
    for start, stop in pair_shards(plan, 40):
        work(start, stop, quiet())
    np.testing.assert_array_equal(writer.rows[:, 0], plan.text + 1000 * plan.image)
    assert feats.largest == 1
    assert feats.read == sorted(set(plan.image.tolist()))
    assert max(sessions[1].sizes) <= 4


@pytest.mark.parametrize("size", [1, 7, 40, 10**6])
def test_shards_of_pairs_end_between_pictures(size: int) -> None:
    plan = a_plan(1, 12, 30)
    shards = list(pair_shards(plan, size))
    assert [start for start, _ in shards] == [0, *(stop for _, stop in shards[:-1])]
    assert shards[-1][1] == len(plan.image)
    for start, stop in shards[:-1]:
        assert stop - start >= size
        assert plan.image[stop - 1] != plan.image[stop]
    assert shards == list(pair_shards(plan, size))


def test_enc_stands_first(tiny_data: Path) -> None:
    data = read_data(tiny_data)
    ids = itm_ids(data)
    assert set(ids[:, 0]) == {59} == {data.encode_id}
    np.testing.assert_array_equal(ids[:, 1:], data.ids[:, 1:])
    assert set(data.ids[:, 0]) == {2}  # what is on the disk is not changed


def test_score_picture_pads_nothing_it_need_not() -> None:
    """Captions of like length share a batch, cut to the longest of them."""
    lengths: list[int] = []

    class Itm(FakeSession):
        def run(self, **feeds: np.ndarray) -> dict[str, np.ndarray]:
            lengths.append(feeds["text_ids"].shape[1])
            return super().run(**feeds)

    mask = (np.arange(8) < np.array([2, 8, 3, 8, 2, 3])[:, None]).astype(np.int64)
    found = score_picture([Itm("itm_logits")], np.zeros((1, 2, 2), np.float32), np.ones((6, 8), np.int64), mask, 2)  # type: ignore[list-item]
    assert lengths == [2, 3, 8]
    assert found.shape == (6, 2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none(value: float) -> None:
    with pytest.raises(UserError, match="The graph gave NaN or infinity in itm_logits"):
        refuse_nan("itm_logits", np.array([[0.0, value]]))


@pytest.mark.parametrize("name", ["text_embed", "image", "image_kv"])
def test_a_graph_that_gives_nan(atc_graphs: Path, tiny_data: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(atc_graphs, tmp_path / "graphs")
    path = tmp_path / "graphs" / f"{name}.onnx"
    model = onnx.load(path)
    tensor = max((t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT), key=lambda t: len(t.raw_data))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32("nan"), tensor.name))
    path.write_bytes(model.SerializeToString())
    rewrite(tmp_path / "graphs", lambda content: None)
    message = chain.refusal(chain.run(tmp_path / "graphs", tiny_data, tmp_path / "outputs"))
    assert message.startswith("The graph gave NaN or infinity in ")
    assert not (tmp_path / "outputs").exists()


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what the manifest of `folder` says, and make its sizes and hashes fit."""
    found = json.loads((folder / manifest.NAME).read_text("utf-8"))
    kind = found["kind"]
    content = {key: value for key, value in found.items() if key not in ("format", "kind", "made_by", "files")}
    change(content)
    (folder / manifest.NAME).unlink()
    manifest.write(folder, kind, content)


@pytest.mark.parametrize(
    ("name", "value"), [("image_size", 64), ("vocab", 61), ("max_length", 30), ("tokenizer_sha256", "0" * 64)]
)
def test_data_of_another_model(atc_graphs: Path, tiny_data: Path, tmp_path: Path, name: str, value: object) -> None:
    shutil.copytree(tiny_data, tmp_path / "data")
    rewrite(tmp_path / "data", lambda content: content["protocol"].update({name: value}))
    message = chain.refusal(chain.run(atc_graphs, tmp_path / "data", tmp_path / "outputs"))
    assert message.startswith(f"{tmp_path / 'data'} was made with {name} {value}, the graphs want ")
    assert message.endswith(f"Write the data again: blip-pre retrieval --graphs {atc_graphs} ...")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("text_embed", "image_kv", "itm_cached"), "has no graph 'image'. Export it: blip-export --graphs image ..."),
        (("image", "image_kv", "itm_cached"), "has no graph 'text_embed'."),
        (
            ("text_embed", "image", "image_kv"),
            "has no graph 'itm_cached'. Export it: blip-export --graphs image_kv,itm_cached ...",
        ),
    ],
)
def test_missing_graphs(atc_graphs: Path, tiny_data: Path, tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    graphs = chain.with_only(atc_graphs, tmp_path / "graphs", *names)
    assert said in chain.refusal(chain.run(graphs, tiny_data, tmp_path / "outputs"))


def test_captions_longer_than_the_static_graphs(tiny_data: Path, tmp_path: Path) -> None:
    needed = ("--graphs", "text_embed,image,image_kv,itm_cached")
    graphs = chain.export_graphs(tmp_path, *needed, "--target", "atc", "--length", 8)
    message = chain.refusal(chain.run(graphs, tiny_data, tmp_path / "outputs"))
    assert message.startswith(f"{tiny_data} was made with max_length 35, the graphs want 8. Write the data again: ")


def garble(content: dict[str, Any]) -> None:
    del content["graphs"]["image"]["inputs"]


def other_axis(content: dict[str, Any]) -> None:
    content["graphs"]["image"]["outputs"][0]["shape"][1] = 21


def unknown_graph(content: dict[str, Any]) -> None:
    content["graphs"]["qformer"] = content["graphs"]["image"]


def no_tokenizer(content: dict[str, Any]) -> None:
    del content["tokenizer"]


def unlisted(content: dict[str, Any]) -> None:
    content["graphs"]["image"]["file"] = "../image.onnx"


def two_batches(content: dict[str, Any]) -> None:
    content["graphs"]["text_embed"]["inputs"][1]["shape"][0] = 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (garble, "describes the graph 'image' wrongly: 'inputs'"),
        (other_axis, "The graph 'image' in"),
        (unknown_graph, "holds a graph 'qformer' that this release does not know."),
        (no_tokenizer, "lacks or garbles 'tokenizer'."),
        (unlisted, "does not list its own file '../image.onnx'."),
        (two_batches, "The graph 'text_embed' in"),
    ],
)
def test_a_garbled_manifest(atc_graphs: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str) -> None:
    shutil.copytree(atc_graphs, tmp_path / "graphs")
    rewrite(tmp_path / "graphs", change)
    with pytest.raises(UserError) as error:
        read_graphs(tmp_path / "graphs")
    assert said in error.value.message
    assert "blip-export" in error.value.message


@pytest.mark.parametrize(
    "options",
    [
        ("--batchsize", 0),
        ("--itm-batchsize", 0),
        ("--k-test", 0),
        ("--threads", 0),
        ("--provider", "tpu"),
        ("--feat-dtype", "int8"),
    ],
)
def test_misuse(atc_graphs: Path, tiny_data: Path, tmp_path: Path, options: tuple[object, ...]) -> None:
    assert f"Invalid value for '{options[0]}'" in chain.refusal(
        chain.run(atc_graphs, tiny_data, tmp_path / "o", *options), code=2
    )
    assert not list(tmp_path.iterdir())


def test_folders_in_each_others_place(atc_graphs: Path, tiny_data: Path, tmp_path: Path) -> None:
    assert "is a 'data' folder, expected 'graphs'" in chain.refusal(chain.run(tiny_data, tiny_data, tmp_path / "o"))
    assert "is a 'graphs' folder, expected 'data'" in chain.refusal(chain.run(atc_graphs, atc_graphs, tmp_path / "o"))
    assert "There is no folder" in chain.refusal(chain.run(tmp_path / "none", tiny_data, tmp_path / "o"))
    (tmp_path / "file").write_text("")
    assert "--out takes a folder" in chain.refusal(chain.run(atc_graphs, tiny_data, tmp_path / "file"), code=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("")
    assert "is not an outputs folder" in chain.refusal(chain.run(atc_graphs, tiny_data, tmp_path / "mine"), code=2).replace(
        "a outputs", "an outputs"
    )


def test_what_it_says_and_keeps(atc_graphs: Path, tiny_data: Path, tmp_path: Path) -> None:
    pictures, captions = len(chain.OWN), sum(chain.OWN)
    printed = chain.done(chain.run(atc_graphs, tiny_data, tmp_path / "outputs", "--k-test", 99)).splitlines()
    assert printed == [
        "k_test 99 is larger than the set (14 pictures, 35 captions): every pair is scored.",
        "490 pairs at k_test 99: 490 for the pictures, 490 for the captions, 490 of them for both.",
        f"Outputs: {tmp_path / 'outputs'}",
    ]
    found = read_retrieval(tmp_path / "outputs", verify=True)
    assert found.run["k_test"] == 99
    assert found.run["graphs"]["used"] == ["image", "text_embed", "image_kv", "itm_cached"]
    assert found.run["data"]["digest"] == manifest.read(tiny_data, "data").digest
    stages = {row["stage"]: row["items"] for row in found.run["timings"]}
    assert stages == {"pictures": pictures, "captions": captions, "plan": pictures + captions, "pairs": pictures * captions}
    for name, rows in (("image_embed", pictures), ("text_embed", captions), ("itm_logits", pictures * captions)):
        assert len(getattr(found, name)) == rows
    np.testing.assert_allclose(np.linalg.norm(found.image_embed[:], axis=1), 1, atol=1e-5)
    assert np.load(tmp_path / "outputs" / "image_feat.npy").shape == (pictures, TINY.vision.tokens, TINY.vision.width)


def test_k_test_of_the_model(atc_graphs: Path, tiny_data: Path, tmp_path: Path) -> None:
    chain.done(chain.run(atc_graphs, tiny_data, tmp_path / "outputs"))
    assert read_retrieval(tmp_path / "outputs").run["k_test"] == TINY.protocol.k_test == 5


def test_both_layouts_of_data_give_the_same(atc_graphs: Path, tiny_data: Path, tmp_path: Path) -> None:
    files = chain.prepare(tmp_path, atc_graphs, "--layout", "files")
    for name, data in (("packed", tiny_data), ("files", files)):
        chain.done(chain.run(atc_graphs, data, tmp_path / name, "--k-test", K, "--verify"))
    for path in (tmp_path / "packed").glob("*.npy"):
        assert path.read_bytes() == (tmp_path / "files" / path.name).read_bytes()


def test_batch_sizes_do_not_matter(ort_graphs: Path, tiny_data: Path, tmp_path: Path) -> None:
    """To float rounding: measured 1.8e-6 on logits that reach 3."""
    found = []
    for n, options in enumerate([("--batchsize", 1, "--itm-batchsize", 1), ("--batchsize", 64, "--itm-batchsize", 64)]):
        chain.done(chain.run(ort_graphs, tiny_data, tmp_path / str(n), "--k-test", K, *options))
        found.append(read_retrieval(tmp_path / str(n)))
    np.testing.assert_array_equal(found[0].pair_text[:], found[1].pair_text[:])
    np.testing.assert_allclose(found[0].itm_logits[:], found[1].itm_logits[:], rtol=0, atol=2e-5)


def test_a_complete_run_is_not_replaced_without_a_word(ort_graphs: Path, tiny_data: Path, tmp_path: Path) -> None:
    chain.done(chain.run(ort_graphs, tiny_data, tmp_path / "o", "--k-test", 3))
    again = chain.done(chain.run(ort_graphs, tiny_data, tmp_path / "o", "--k-test", 4))
    assert "holds a complete run that differs in k_test; it is replaced once this one is complete." in again
