"""A session takes what its GraphSpec says and nothing else, and padding never leaves it."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from models.errors import UserError
from models.spec import GraphSpec, graph_specs
from runtime.graphs import read_graphs
from runtime.onnx_session import PROVIDER_NAMES, available_provider
from runtime.session import Session, open_session
from tests import chain
from tests.tiny import TINY, TINY2

SPECS = graph_specs(TINY)
WHOLE = TINY.protocol.max_length
# A batch of 3 with copied rows and a text with masked columns against the rows alone. Measured at most 2.4e-7.
TOLERANCE = 2e-6


def feeds(name: str, rows: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of graph `name` with texts of unequal length."""
    random = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}
    for tensor in SPECS[name].bind(rows, length).inputs:
        shape = [int(dim) for dim in tensor.shape]
        if tensor.name == "text_ids":
            found[tensor.name] = random.integers(5, 55, shape)
        elif tensor.name == "text_atten_mask":
            lengths = random.integers(1, length + 1, rows)
            lengths[0] = length
            found[tensor.name] = (np.arange(length) < lengths[:, None]).astype(np.int64)
        else:
            found[tensor.name] = random.normal(size=shape).astype(np.float32)
    return found


class Untouched:
    """A backend that must not be reached."""

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        raise AssertionError("the backend was called")


def refused(change: dict[str, Any], batch: int | None = None, length: int | None = None) -> str:
    """Feed `itm_cached` (2, 7) inputs with some changed (None: left out); returns the error."""
    given = {**feeds("itm_cached", 2, 7), **change}
    session = Session(SPECS["itm_cached"], Untouched(), batch, length)
    with pytest.raises(UserError) as error:
        session.run(**{name: value for name, value in given.items() if value is not None})
    assert "\n" not in error.value.message
    return error.value.message


IDS = np.ones((2, 7), np.int64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cross_kv": None}, "itm_cached takes text_ids, text_atten_mask, cross_kv; it was fed text_atten_mask, text_ids."),
        ({"image": IDS}, "it was fed cross_kv, image, text_atten_mask, text_ids."),
        ({"text_ids": None, "text_atten_mask": None, "cross_kv": None}, "it was fed nothing."),
        ({"text_ids": IDS.astype(np.int32)}, "itm_cached: text_ids is int32, the graph takes int64."),
        ({"cross_kv": feeds("itm_cached", 1, 3)["cross_kv"].astype(np.float64)}, "cross_kv is float64, the graph takes float32."),
        ({"text_ids": IDS[0]}, "text_ids has shape [7], the graph takes ['B', 'L']."),
        ({"text_atten_mask": IDS[:, :6]}, "text_atten_mask has shape [2, 6]"),
        ({"text_atten_mask": IDS[:1]}, "text_atten_mask has shape [1, 7]"),
        ({"cross_kv": np.zeros((2, 4, 4, 17, 10), np.float32)}, "cross_kv has shape [2, 4, 4, 17, 10], the graph takes [1, 4,"),
        ({"cross_kv": np.zeros((1, 4, 4, 16, 10), np.float32)}, "cross_kv has shape [1, 4, 4, 16, 10]"),
    ],
)
def test_wrong_feeds(change: dict[str, Any], said: str) -> None:
    assert said in refused(change)


def test_more_than_a_static_graph_holds() -> None:
    assert refused({}, batch=1, length=7) == "itm_cached was exported for 1 rows of length 7; it was fed 2 rows of length 7."
    assert "any number of rows of length 6" in refused({}, length=6)


@pytest.mark.parametrize("rows", [1, 2, chain.STATIC])
@pytest.mark.parametrize("name", list(SPECS))
def test_padding_stays_inside(ort_graphs: Path, atc_graphs: Path, name: str, rows: int) -> None:
    """The static graph, fed fewer rows and a shorter text than it was made for, gives what the dynamic one gives."""
    static, dynamic = (open_session(read_graphs(folder), name) for folder in (atc_graphs, ort_graphs))
    assert static.batch == chain.STATIC
    assert static.length == (WHOLE if SPECS[name].inputs[0].name == "text_ids" else None)
    given = feeds(name, rows, 9)
    kept = {key: value.copy() for key, value in given.items()}
    found, wanted = static.run(**given), dynamic.run(**given)
    assert list(found) == [t.name for t in SPECS[name].outputs]
    for tensor in SPECS[name].bind(rows, 9).outputs:
        assert found[tensor.name].shape == wanted[tensor.name].shape == tensor.shape
        np.testing.assert_allclose(found[tensor.name], wanted[tensor.name], rtol=0, atol=TOLERANCE)
    for key, value in kept.items():
        np.testing.assert_array_equal(given[key], value)  # what the caller owns is not padded in place


class Whole:
    """A backend of fixed axes, which gives every output whole."""

    def __init__(self, spec: GraphSpec) -> None:
        self.spec = spec

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        for tensor in self.spec.inputs:
            assert feeds[tensor.name].shape == tensor.shape
        return [np.zeros([int(dim) for dim in tensor.shape], tensor.dtype) for tensor in self.spec.outputs]


@pytest.mark.parametrize("name", list(graph_specs(TINY2)))
def test_padding_is_cut_from_every_axis_of_every_output(name: str) -> None:
    """text_feat of BLIP-2 has an output for each word: as many as were fed, not as many as the graph is made for."""
    symbolic = graph_specs(TINY2)[name]
    session = Session(symbolic, Whole(symbolic.bind(4, 9)), 4, 9)
    found = session.run(**{t.name: np.zeros([int(dim) for dim in t.shape], t.dtype) for t in symbolic.bind(2, 5).inputs})
    assert {name: array.shape for name, array in found.items()} == {t.name: t.shape for t in symbolic.bind(2, 5).outputs}


def test_rows_do_not_depend_on_their_neighbours(ort_graphs: Path) -> None:
    """The comparison above would not see rows mixed up if all rows were alike."""
    session = open_session(read_graphs(ort_graphs), "itm_cached")
    found = session.run(**feeds("itm_cached", 3, 9))["itm_logits"]
    assert np.abs(found[0] - found[1]).max() > 100 * TOLERANCE


@pytest.mark.parametrize("provider", ["cuda", "cann"])
def test_absent_provider(
    ort_graphs: Path, tiny_data: Path, tmp_path: Path, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Said here, so that the test is the same where a GPU build of ONNX Runtime is installed.
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    message = chain.refusal(chain.run(ort_graphs, tiny_data, tmp_path / "outputs", "--provider", provider))
    assert message.startswith(
        f"ONNX Runtime here has no {PROVIDER_NAMES[provider]}, only CPUExecutionProvider. Install onnxruntime-"
    )
    assert not (tmp_path / "outputs").exists()


def test_no_silent_fall_back(ort_graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider that is listed but does not start must not leave the work to the CPU."""
    graphs = read_graphs(ort_graphs)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDER_NAMES.values()))
    real = onnxruntime.InferenceSession

    def on_cpu(path: str, options: Any, providers: list[str], **others: Any) -> Any:
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", on_cpu)
    with pytest.raises(UserError, match=r"could not start CUDAExecutionProvider and fell back to CPUExecutionProvider"):
        open_session(graphs, "text_embed", "cuda")
    assert available_provider("cpu") == "CPUExecutionProvider"


def copied(graphs: Path, tmp_path: Path) -> Path:
    shutil.copytree(graphs, tmp_path / "graphs")
    return tmp_path / "graphs"


@pytest.mark.parametrize("how", ["zeros", "noise", "cut"])
def test_damaged_graph_of_equal_size(ort_graphs: Path, tmp_path: Path, how: str) -> None:
    folder = copied(ort_graphs, tmp_path)
    path = folder / "text_embed.onnx"
    data = path.read_bytes()
    damaged = {
        "zeros": bytes(len(data)),
        "noise": np.random.default_rng(0).bytes(len(data)),
        "cut": data[:1000] + bytes(len(data) - 1000),
    }
    path.write_bytes(damaged[how])
    with pytest.raises(
        UserError, match=r"text_embed\.onnx cannot be loaded: .*Write the graphs again with blip-export\."
    ) as error:
        open_session(read_graphs(folder), "text_embed")
    assert "\n" not in error.value.message
    with pytest.raises(UserError, match="sha256 differs"):
        read_graphs(folder, verify=True)


def test_truncated_graph(ort_graphs: Path, tmp_path: Path) -> None:
    folder = copied(ort_graphs, tmp_path)
    path = folder / "text_embed.onnx"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"bytes, its manifest says .* Write the folder again with blip-export"):
        read_graphs(folder)


@pytest.mark.parametrize(("name", "other"), [("text_embed", "image_embed"), ("itm_cached", "itm"), ("image_feat", "image_embed")])
def test_graphs_swapped(ort_graphs: Path, tmp_path: Path, name: str, other: str) -> None:
    """Another graph's file under this graph's name: the manifest's sizes are made to fit, the session still sees it."""
    folder = copied(ort_graphs, tmp_path)
    graphs = read_graphs(folder)
    shutil.copyfile(folder / f"{other}.onnx", folder / f"{name}.onnx")
    with pytest.raises(UserError, match=rf"{name}\.onnx has the (inputs|outputs) .* its manifest says"):
        open_session(graphs, name)


def test_a_failure_inside_the_engine_is_a_sentence(ort_graphs: Path) -> None:
    """An id outside of the vocabulary: the engine's own error, shortened."""
    given = feeds("text_embed", 2, 5)
    given["text_ids"][0, 0] = 10**6
    with pytest.raises(UserError, match=r"text_embed failed in ONNX Runtime: .*\.$") as error:
        open_session(read_graphs(ort_graphs), "text_embed").run(**given)
    assert "\n" not in error.value.message


def test_cann_leaves_nothing_to_the_cpu(ort_graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime itself refuses: this build knows no CANN, and every operator would be left to the CPU."""
    graphs = read_graphs(ort_graphs)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDER_NAMES.values()))
    real = onnxruntime.InferenceSession

    def quietly(path: str, options: Any, providers: list[str], **others: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no such provider
            return real(path, options, providers=providers, **others)

    assert open_session(graphs, "text_embed").batch is None
    monkeypatch.setattr(onnxruntime, "InferenceSession", quietly)
    with pytest.raises(UserError, match=r"text_embed\.onnx has operators that CANNExecutionProvider does not run"):
        open_session(graphs, "text_embed", "cann")
