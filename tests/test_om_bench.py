"""blip-bench over om/ folders, with stand-ins for ais_bench; and several batches of one call. No test looks at a speed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

import bench.__main__
from bench import bandwidth
from bench.forms import Load
from bench.measure import Timing
from bench.om import OmRow, batches_of, spread, time_om
from bench.om_table import ais_bench_lines, left_out, om_table
from bench.traffic import kept_read, step_bytes, weights_read
from models.errors import Misuse, UserError
from models.spec import BATCH, graph_specs
from runtime.graphs import Graphs, all_sizes, read_graphs
from runtime.om_session import OmBackend
from tests import chain
from tests.bench_run import blip_bench, record_in
from tests.generators import export_generator
from tests.om_folder import SOC, write_om
from tests.tiny import TINY

NAMES = list(graph_specs(TINY))
FEW = ("--loops", 3, "--warmup", 1)
NUMBER = r"[0-9.e-]+"
TIMES = rf"min = {NUMBER}, max = {NUMBER}, mean = ({NUMBER}), median = {NUMBER}, percentile\(99%\) = {NUMBER}"
NPU = re.compile(rf"\[INFO\] NPU_compute_time \(ms\): {TIMES}")
THROUGHPUT = re.compile(rf"\[INFO\] throughput 1000\*batchsize\.mean\((\d+)\)/NPU_compute_time\.mean\(({NUMBER})\): ({NUMBER})")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products and sums for the roofs of ONNX Runtime."""
    monkeypatch.setattr("bench.peak.PRODUCTS", ((16, 8, 32),))
    monkeypatch.setattr(bandwidth, "LEAST", 1 << 16)
    monkeypatch.setattr(bandwidth, "MOST", 1 << 16)


@pytest.fixture(scope="module")
def om(tmp_path_factory: pytest.TempPathFactory, atc_graphs: Path) -> Path:
    """Every graph of TINY for batches of 3, text_embed and image for batches of 1, too."""
    options = ("--target", "atc", "--batchsize", 1, "--graphs", "text_embed,image")
    one = chain.export_graphs(tmp_path_factory.mktemp("one"), *options)
    return write_om(tmp_path_factory.mktemp("om") / "om", atc_graphs, one)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Graphs of a captioner and of BLIP-2 with a language model whose batch is open, with three sequences of each prompt."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = export_generator(tmp_path_factory.mktemp(kind), kind, "ascend", "--beams", 3, "--length", 8)
        return made[kind]

    return of


def om_bench(folder: Path, *options: object) -> Result:
    return chain.call(bench.__main__.main, "--graphs", folder, *FEW, *options)


def row_of(npu: dict[int, tuple[float, ...]], *seconds: float, graph: str = "itm", batch: int = 4) -> OmRow:
    return OmRow(graph, batch, 35, f"{graph}_bs{batch}.om", npu, Timing(seconds))


def test_lines_of_known_times() -> None:
    """The figures of ais_bench's formula, and its lines."""
    row = row_of({0: (1.0, 2.0, 6.0)}, 0.1, 0.3)
    head, npu, throughput, whole, _ = ais_bench_lines(row)
    assert head == "itm_bs4.om, batch 4"
    assert npu == "[INFO] NPU_compute_time (ms): min = 1.0, max = 6.0, mean = 3.0, median = 2.0, percentile(99%) = 5.92"
    assert throughput == "[INFO] throughput 1000*batchsize.mean(4)/NPU_compute_time.mean(3.0): 1333.3333333333333"
    times = "min = 100.000, max = 300.000, mean = 200.000, median = 200.000, percentile(99%) = 298.000"
    assert whole == f"end to end (ms): {times}; 20.00 samples/s"
    assert spread([1.0, 2.0, 6.0])["percentile(99%)"] == pytest.approx(5.92)


def test_several_npus_add_up() -> None:
    """Each has a batch of its own; they run at the same time."""
    row = row_of({0: (2.0, 2.0), 3: (4.0, 4.0)}, 0.1)
    assert row.npu_samples_per_s == 2000 + 1000
    assert row.samples_per_s == pytest.approx(80.0)
    said = ais_bench_lines(row)
    assert [line for line in said if line.startswith("NPU ")] == ["NPU 0", "NPU 3"]
    record = row.record()
    assert [(found["device"], found["ms"]["mean"], found["samples_per_s"]) for found in record["npu"]] == [
        (0, 2.0, 2000.0),
        (3, 4.0, 1000.0),
    ]
    assert (record["npu_samples_per_s"], record["end_to_end_samples_per_s"]) == (3000.0, 80.0)


def test_the_table() -> None:
    """A line per batch, five graphs abreast; what is not there is a dash."""
    rows = [
        row_of({0: (8.0,)}, 0.016, graph=f"graph{n}", batch=batch) for n in range(6) for batch in (64, 4) if (n, batch) != (1, 4)
    ]
    lines = om_table(rows)
    assert lines[2].split() == ["batch", *(f"graph{n}" for n in range(5))]
    assert lines[4].split() == ["4", "500.00", "250.00", "-", "-", *["500.00", "250.00"] * 3]
    assert lines[5].split() == ["64", *["8000.00", "4000.00"] * 5]
    assert lines[7].split() == ["batch", "graph5"]
    assert lines[-1].split() == ["64", "8000.00", "4000.00"]
    assert max(map(len, lines)) <= 120
    assert left_out({"a": [1], "b": [], "c": []}) == ["Not compiled for any of these batches, and not timed: b, c."]


def test_every_graph_at_every_batch(generation: str, om: Path, tmp_path: Path) -> None:
    said = chain.done(om_bench(om, "--batchsize", "1,3", "--device", 0, "--record", tmp_path))
    found = record_in(tmp_path)
    assert re.fullmatch(rf"om-config-bs1-3-{SOC}-npu0-\d{{8}}-\d{{6}}\.json", found["file"])
    timed = [(name, batch) for name in NAMES for batch in ((1, 3) if name in ("text_embed", "image") else (3,))]
    assert [(row["graph"], row["batch"]) for row in found["rows"]] == timed
    for row in found["rows"]:
        assert (row["loops"], len(row["npu_ms"]["0"]), len(row["seconds"])) == (3, 3, 3)
        assert row["file"] == f"{row['graph']}_bs{row['batch']}.om"
        # The NPU's time is a part of each run's.
        assert all(ms < 1e3 * whole for ms, whole in zip(row["npu_ms"]["0"], row["seconds"], strict=True))
        assert row["npu_samples_per_s"] == pytest.approx(1000 * row["batch"] / np.mean(row["npu_ms"]["0"]), rel=0.01)
        assert row["npu_samples_per_s"] > row["end_to_end_samples_per_s"]
    assert found["rows"][0]["length"] == TINY.protocol.max_length
    assert (found["batchsize"], found["soc"], found["device"], found["provider"]) == ([1, 3], SOC, [0], "om")
    assert found["graphs"].keys() >= {"cann", "precision", "graphs_digest"}
    assert "peak" not in found
    assert "peak" not in said.lower()
    means, throughputs = NPU.findall(said), THROUGHPUT.findall(said)
    assert [int(batch) for batch, _, _ in throughputs] == [batch for _, batch in timed]
    assert [mean for _, mean, _ in throughputs] == means
    for batch, mean, per_s in throughputs:
        assert float(per_s) == pytest.approx(1000 * int(batch) / float(mean))
    table = [line.split() for line in said.partition("Samples per second")[2].splitlines() if re.match(r" +[13] ", line)]
    # Five graphs abreast, then two; of batch 1 the first and the fourth are there.
    assert [(line[0], line.count("-")) for line in table] == [("1", 6), ("3", 0), ("1", 4), ("3", 0)]
    assert float(table[1][1]) == pytest.approx(found["rows"][1]["npu_samples_per_s"], abs=0.01)
    assert float(table[1][2]) == pytest.approx(found["rows"][1]["end_to_end_samples_per_s"], abs=0.01)


def test_all_batches_and_a_hundred_loops_unless_said(today: None, om: Path, tmp_path: Path) -> None:
    chain.done(chain.call(bench.__main__.main, "--graphs", om, "--only", "text_embed", "--record", tmp_path))
    rows = record_in(tmp_path)["rows"]
    assert [(row["batch"], row["loops"], len(row["npu_ms"]["0"])) for row in rows] == [(1, 100, 100), (3, 100, 100)]


def test_on_two_npus(today: None, om: Path, tmp_path: Path) -> None:
    said = chain.done(om_bench(om, "--only", "itm,image", "--batchsize", 3, "--device", "0,2", "--record", tmp_path))
    found = record_in(tmp_path)
    assert "-npu0-2-" in found["file"]
    assert f"{SOC}, CANN 8, precision origin; NPU 0, 2, a batch on each at the same time; 3 runs, 1 before them." in said
    for row in found["rows"]:
        assert {device: len(times) for device, times in row["npu_ms"].items()} == {"0": 3, "2": 3}
        assert row["end_to_end_samples_per_s"] == pytest.approx(2 * 3 / np.mean(row["seconds"]), rel=0.01)
    assert len(NPU.findall(said)) == 4


@pytest.mark.parametrize("kind", ["caption", "opt"])
def test_models_that_write_words(today: None, generator_graphs: Callable[[str, str], Path], tmp_path: Path, kind: str) -> None:
    """Graph by graph, on two NPUs; of a decoder a sample is a prompt, whatever the number of its sequences."""
    om = write_om(tmp_path / "om", generator_graphs(kind, "atc"))
    chain.done(om_bench(om, "--device", "0,1", "--record", tmp_path / "records"))
    rows = {row["graph"]: row for row in record_in(tmp_path / "records")["rows"]}
    assert list(rows) == list(read_graphs(om).content["graphs"])
    writer = rows["text_decoder" if kind == "caption" else "llm_decode"]
    entry = read_graphs(om).oms[writer["graph"]]
    assert (writer["batch"], entry.spec.inputs[0].shape[0]) == (entry.batch, entry.batch)
    assert writer["end_to_end_samples_per_s"] == pytest.approx(2 * entry.batch / np.mean(writer["seconds"]), rel=0.01)


def test_times_that_ais_bench_did_not_take(today: None, om: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(time_om(read_graphs(om), "itm", 3, 1).npu_ms[0]) == 3
    monkeypatch.setattr(OmBackend, "npu_ms", lambda _: [1.0, 2.0])
    with pytest.raises(UserError, match="ais_bench counted 2 runs on an NPU, at least 3 were made"):
        time_om(read_graphs(om), "itm", 3, 1)


def test_batches_that_are_there(om: Path) -> None:
    graphs = read_graphs(om)
    assert batches_of(graphs, ["itm", "image"], None) == {"itm": [3], "image": [1, 3]}
    assert batches_of(graphs, ["itm", "image"], [1]) == {"itm": [], "image": [1]}
    with pytest.raises(Misuse, match=r"no \.om for batches of 1; --batchsize can be 3\."):
        batches_of(graphs, ["itm"], [1])


def test_graphs_without_the_batch_are_named(today: None, om: Path) -> None:
    said = chain.done(om_bench(om, "--batchsize", 1, "--only", "text_embed,itm", "--no-record"))
    assert "Not compiled for any of these batches, and not timed: itm." in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--batchsize", "1,2"), "has no .om for batches of 2; --batchsize can be 1, 3. blip-atc --batchsize compiles others."),
        (("--batchsize", "1,x"), "'x' is not a valid integer range"),
        (("--compare", "transformers"), "--compare runs on the CPU, and "),
        (("--provider", "cuda"), "--provider is of ONNX Runtime"),
        (("--device", "0,0"), "--device is '0,0'"),
        (("--threads", 2), "--threads is of graphs that ONNX Runtime runs"),
        (("--length", 8), "--length is of graphs that ONNX Runtime runs"),
        (("--num-beams", 3), "--num-beams is of graphs that ONNX Runtime runs"),
        (("--only", "imag"), "has no graph 'imag'"),
    ],
)
def test_wrong_commands(today: None, om: Path, tmp_path: Path, options: tuple[object, ...], said: str) -> None:
    assert said in chain.refusal(om_bench(om, *options, "--record", tmp_path / "records"), 2)
    assert not (tmp_path / "records").exists()


def test_npus_for_graphs_that_have_none(atc_graphs: Path) -> None:
    found = chain.refusal(blip_bench(atc_graphs, "--device", 0, "--no-record"), 2)
    assert found.startswith(f"--device is of graphs compiled for an NPU, and {atc_graphs} holds none")


def test_several_batches_of_onnx(tmp_path: Path) -> None:
    """Each in turn, with a record of its own."""
    graphs = chain.export_graphs(tmp_path, "--target", "ascend", "--graphs", "text_embed")
    said = chain.done(blip_bench(graphs, "--batchsize", "2,5,2", "--record", tmp_path / "records"))
    assert said.count("Record: ") == 2
    found = [json.loads(path.read_text("utf-8")) for path in sorted((tmp_path / "records").iterdir())]
    assert [(each["batchsize"], each["rows"][0]["batch"]) for each in found] == [(2, 2), (5, 5)]


def test_several_batches_of_graphs_that_have_one(atc_graphs: Path) -> None:
    found = chain.refusal(blip_bench(atc_graphs, "--batchsize", "1,4", "--no-record"), 2)
    assert found.startswith("text_embed was exported for batches of 3 alone; give one --batchsize")


@pytest.mark.parametrize("kind", ["caption", "opt"])
def test_graphs_with_an_open_batch(exported: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    """Those of --target ascend in ONNX Runtime, before they are compiled."""
    options = ("--batchsize", "2,4", "--new-tokens", 4, "--num-beams", "1,3", "--record", tmp_path)
    said = chain.done(blip_bench(exported(kind), *options))
    two, four = (json.loads(path.read_text("utf-8")) for path in sorted(tmp_path.iterdir()))
    for row, other in zip(two["rows"], four["rows"], strict=True):
        assert 2 * row["batch"] == other["batch"]
        assert 2 * row["flops"] == pytest.approx(other["flops"], rel=0.2)
    assert [text["num_beams"] for text in four["generation"]] == [1, 3]
    assert "text_decoder (batch" not in said


@pytest.mark.parametrize(("kind", "columns"), [("caption", (3, 3)), ("opt", (1, 3))])
def test_bytes_of_a_step_with_an_open_batch(exported: Callable[[str], Path], kind: str, columns: tuple[int, int]) -> None:
    """All rows in one run: the weights once, and every row's buffer. Columns that a captioner's graph has are looked up, used
    or not."""
    graphs = read_graphs(exported(kind))
    writer = "text_decoder" if kind == "caption" else "llm_decode"
    weights, one = weights_read(graphs.path(writer)), _buffer(graphs, writer)
    beside = step_bytes(graphs, Load(1, 4, 1, 0, 1, "cpu"), 1, 4, True) - weights - columns[0] * one  # the picture's
    for batch in (1, 4):
        for beams, rows in zip((1, 3), columns, strict=True):
            found = step_bytes(graphs, Load(batch, 4, 1, 0, 1, "cpu"), beams, 4, True)
            assert found == weights + batch * (rows * one + beside)


def _buffer(graphs: Graphs, writer: str) -> int:
    """Bytes of one row of `past`."""
    whole = graphs.symbolic[writer].bind(**{"batch": 1, "length": 1, **all_sizes(graphs, writer)})
    (past,) = (tensor for tensor in whole.inputs if tensor.name == "past")
    rows = int(past.shape[0])
    assert BATCH not in all_sizes(graphs, writer)
    assert kept_read(whole) >= 4 * np.prod([int(dim) for dim in past.shape])
    return int(4 * np.prod([int(dim) for dim in past.shape])) // rows
