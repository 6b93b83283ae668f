"""The bench: its arithmetic on known times, its inputs, its comparison on a tiny model, its record. No test looks at a speed."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench import machine, measure, table
from bench.captions import choose_captions
from bench.compare import Measured, chosen_works
from bench.graphs import Load, Row, own_forms, random_inputs
from bench.measure import Timing, interleave, time_loops
from bench.peak import PRODUCTS, Peak, onnxruntime_peak, torch_peak
from models.config import Config
from models.errors import Misuse
from models.spec import graph_specs
from preprocess.text import CaptionTokenizer
from runtime.graphs import read_graphs
from runtime.session import check_feeds
from tests import chain
from tests.bench_run import COMPARED, annotations, blip_bench, record_in
from tests.tiny import TINY, TINY2, random_model


@pytest.fixture(autouse=True)
def _small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real ones take seconds."""
    monkeypatch.setattr("bench.peak.PRODUCTS", ((16, 8, 32), (64, 64, 64)))


class Clock:
    """Time that passes only when someone works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: self.now, sleep=lambda _: None))

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_percentiles() -> None:
    timing = Timing(tuple(float(n) for n in range(101, 0, -1)))
    assert (timing.mean, timing.median) == (51.0, 51.0)
    assert timing.p99 == pytest.approx(100.0)
    # Of two calls 99 % lies near the slower one.
    assert Timing((1.0, 2.0)).p99 == pytest.approx(1.99)


def test_warm_up_is_not_timed(clock: Clock) -> None:
    seconds = iter([9.0, 9.0, 1.0, 2.0, 3.0])
    assert time_loops(lambda: clock.work(next(seconds)), loops=3, warmup=2).seconds == (1.0, 2.0, 3.0)


@pytest.mark.parametrize(("seconds", "loops"), [(60.0, 5), (1.0, 10), (0.25, 40), (0.001, 200)])
def test_loops_that_fit_into_the_time(clock: Clock, seconds: float, loops: int) -> None:
    assert len(time_loops(lambda: clock.work(seconds), loops=None, warmup=1).seconds) == loops


def test_interleaved_calls_take_turns(clock: Clock) -> None:
    order: list[str] = []
    ticks: list[int] = []

    def work(name: str, seconds: float) -> None:
        order.append(name)
        clock.work(seconds)

    works = {"a": lambda: work("a", 1.0), "b": lambda: work("b", 10.0)}
    found = interleave(works, rounds=3, warmup=1, tick=lambda: ticks.append(1))
    assert "".join(order) == "baabbaab"
    assert len(ticks) == 8
    assert found == {"a": Timing((1.0,) * 3), "b": Timing((10.0,) * 3)}


def test_ratios_are_of_items_per_second() -> None:
    ours, theirs = Timing((2.0, 1.0, 4.0)), Timing((3.0, 8.0, 4.0))
    found = Measured("pairs", {"ours": 100, "theirs": 10}, {"ours": ours, "theirs": theirs}, {"theirs": 2e-6})
    assert (found.rate("ours"), found.rate("theirs")) == (50.0, 2.5)
    assert found.ratio("theirs") == 20.0
    assert found.ratios("theirs") == (10.0, 80.0)  # 10 times the items in 3 / 2, 8 / 1 and 4 / 4 of the time
    way = found.record()["ways"][1]
    assert (way["ours_is_times"], way["lowest_and_highest_round"], way["max_abs_difference"]) == (20.0, [10.0, 80.0], 2e-6)
    assert table.quote_line([found]) == "Times the speed of transformers: pairs 20.00."
    assert "20.00x (10.00 to 80.00)" in table.compare_lines([found])[2]


def test_a_row_of_known_times() -> None:
    row = Row("itm", 4, 35, Timing((0.1, 0.2, 0.6)), {"MatMul": 3_000_000_000, "Gemm": 1_000_000_000})
    record = row.record(peak=40.0)
    assert (record["mean_ms"], record["median_ms"], record["p99_ms"]) == (300.0, 200.0, 592.0)
    assert record["samples_per_s"] == 13.333  # 4 / 0.3
    assert (record["gflops_per_s"], record["of_peak"]) == (20.0, 0.5)  # 4e9 in 0.2 s
    assert record["seconds"] == [0.1, 0.2, 0.6]
    head, line = table.graph_lines([row], Peak("ONNX Runtime", 1, {"a": 40.0}))
    assert line.split() == ["itm", "4", "35", "3", "300.00", "200.00", "592.00", "13.33", "4.000", "20.0", "50.0%"]
    assert len(head) == len(line) <= 130


def test_peaks_of_both_engines() -> None:
    for peak in (onnxruntime_peak(1, "cpu"), torch_peak(1)):
        assert list(peak.gflops) == ["16x8x32", "64x64x64"]
        assert 0 < min(peak.gflops.values()) <= peak.best == peak.gflops[peak.best_product]
        assert peak.threads == 1


def test_lines_of_real_peaks_fit_the_screen() -> None:
    products = {"x".join(map(str, product)): 12345.6 for product in PRODUCTS}
    peak = Peak("ONNX Runtime", 16, products)
    lines = [*table.peak_lines(peak), *table.library_lines(peak, peak), table.load_line(99.99, 99.99, 128, 128)]
    assert max(map(len, lines)) <= 130


def test_a_busy_machine_is_said() -> None:
    assert table.load_line(0.2, 2.0, 1, 2) == "Load average 0.20 before, 2.00 after; one thread on 2 processors."
    assert table.load_line(3.0, 2.0, 2, 2).endswith(
        "2 threads on 2 processors. Others were running: measure again before quoting this."
    )


def test_of_two_measurements_of_a_peak_the_better_counts() -> None:
    found = Peak("ONNX Runtime", 2, {"a": 5.0, "b": 8.0}).merged(Peak("ONNX Runtime", 2, {"a": 7.0, "b": 2.0}))
    assert found.gflops == {"a": 7.0, "b": 8.0}
    said = table.library_lines(found, Peak("PyTorch", 2, {"a": 2.0, "b": 1.0}))
    assert said[0].startswith("Of these ratios a factor of 4.00 is the matrix library alone: PyTorch")


def test_cpu_model(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: Fast 9\nprocessor: 1\nmodel name: Other\n")
    assert machine.cpu_model(path) == "Fast 9 (family 26, model 2)"
    path.write_text("processor\t: 0\nCPU implementer: 0x41\n")
    assert machine.cpu_model(path) == platform.machine()
    assert machine.cpu_model(tmp_path / "missing")


def test_facts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    facts = machine.facts()
    assert facts["processors"] >= 1
    assert {"numpy", "onnxruntime"} <= facts["versions"].keys()
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() == {}


@pytest.mark.parametrize("config", [TINY, TINY2], ids=["blip", "blip2"])
def test_random_inputs_are_what_the_graphs_take(config: Config) -> None:
    for spec in graph_specs(config).values():
        feeds = random_inputs(spec.bind(3, 7), config.text.vocab)
        assert check_feeds(spec, feeds).get("B") == 3
        if "text_ids" in feeds:
            assert feeds["text_ids"].shape == (3, 7)
            assert feeds["text_ids"].max() < config.text.vocab
            assert feeds["text_atten_mask"].all()


def test_graphs_with_another_form_are_named() -> None:
    rows = [Row("image", 3, None, Timing((1.0,)), {}), Row("itm", 3, 12, Timing((1.0,)), {})]
    load = Load(3, 35, None, 0, 1, "cpu")
    assert own_forms(rows, load) == ["Timed in the one form that they were exported in: itm (batch 3, length 12)."]
    assert own_forms(rows[:1], load) == []


def test_real_captions(ort_graphs: Path, tmp_path: Path) -> None:
    graphs = read_graphs(ort_graphs)
    tokenizer = CaptionTokenizer.load(graphs.tokenizer)
    found = choose_captions(graphs, annotations(tmp_path), 10, 35)
    assert found.ids.shape == found.mask.shape == (10, 35)
    assert set(found.ids[:, 1]) == {chain.TOKENS.index("word0")}  # behind [CLS]
    assert found.describe().startswith("10 captions of captions.json, ")
    np.testing.assert_array_equal(found.itm_ids[:, 1:], found.ids[:, 1:])
    assert set(found.itm_ids[:, 0]) == {tokenizer.encode_id}
    # Drawn at random, but the same ones every time.
    assert len(set(found.mask.sum(axis=1))) > 3
    np.testing.assert_array_equal(found.first(4).ids, choose_captions(graphs, annotations(tmp_path), 10, 35).ids[:4])
    assert len(choose_captions(graphs, annotations(tmp_path), 99, 35).ids) == 40


def test_captions_are_cut_and_padded_to_a_length(ort_graphs: Path, tmp_path: Path) -> None:
    for source in (annotations(tmp_path), None):
        found = choose_captions(read_graphs(ort_graphs), source, 40, 7)
        assert found.ids.shape == (40, 7)
        assert found.mask.sum(axis=1).max() == 7


def test_invented_captions_say_so(ort_graphs: Path) -> None:
    found = choose_captions(read_graphs(ort_graphs), None, 500, 35)
    lengths = found.mask.sum(axis=1)
    assert 11.5 < lengths.mean() < 12.5
    assert lengths.min() >= 8
    assert (found.ids[found.mask == 0] == 0).all()
    assert "invented length" in found.describe()


def test_every_graph_is_timed(ort_graphs: Path, tmp_path: Path) -> None:
    said = chain.done(blip_bench(ort_graphs, "--batchsize", 4, "--record", tmp_path)).splitlines()
    found = record_in(tmp_path)
    assert re.fullmatch(r"graphs-config-bs4-t1-cpu-\d{8}-\d{6}\.json", found["file"])
    assert said[-1] == f"Record: {tmp_path / found['file']}"
    names = list(graph_specs(TINY))
    assert [line.split()[0] for line in said[4 : 4 + len(names)]] == names
    assert max(map(len, said[1:-1])) <= 130  # the first and the last line name folders
    assert [row["graph"] for row in found["rows"]] == names
    for row in found["rows"]:
        assert (row["batch"], row["loops"], len(row["seconds"])) == (4, 2, 2)
        assert row["of_peak"] == pytest.approx(row["gflops_per_s"] / max(found["peak"]["gflops"].values()), abs=0.01)
    assert found["rows"][0]["length"] == TINY.protocol.max_length
    assert found["graphs"]["opset"] == 18
    assert found.keys() >= {"command", "cpu", "python", "versions", "load_average", "threads", "provider", "date"}


def test_record_says_how_it_was_called(ort_graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the bytes of a path."""
    monkeypatch.setattr(sys, "argv", ["/usr/bin/blip-bench", "--record", "caf\udce9"])
    chain.done(blip_bench(ort_graphs, "--only", "text_embed", "--record", tmp_path))
    assert record_in(tmp_path)["command"] == "blip-bench --record 'caf\udce9'"


def test_one_graph_at_another_length(ort_graphs: Path, tmp_path: Path) -> None:
    chain.done(blip_bench(ort_graphs, "--only", "itm,text_embed,itm", "--length", 6, "--record", tmp_path / "new" / "records"))
    rows = record_in(tmp_path / "new" / "records")["rows"]
    assert [(row["graph"], row["batch"], row["length"]) for row in rows] == [("itm", 1, 6), ("text_embed", 1, 6)]


def test_a_static_graph_is_timed_in_its_own_form(atc_graphs: Path) -> None:
    said = chain.done(blip_bench(atc_graphs, "--only", "itm,image", "--batchsize", 16, "--no-record"))
    assert "Timed in the one form that they were exported in: itm (batch 3, length 35), image (batch 3)." in said
    assert "Record" not in said


@pytest.fixture
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "REST_SECONDS", 0.0)


@pytest.mark.usefixtures("_no_rest")
def test_comparison(ort_graphs: Path, tmp_path: Path) -> None:
    checkpoint = ort_graphs.parent / "model" / "model.safetensors"
    options = ("--checkpoint", checkpoint, "--captions", annotations(tmp_path), "--rounds", 3, "--record", tmp_path / "records")
    said = chain.done(blip_bench(ort_graphs, *COMPARED, *options, "--pairs", 38)).splitlines()
    assert max(map(len, said[1:-1])) <= 130  # the first and the last line name folders
    assert any(line.startswith("Captions: 38 captions of captions.json, ") for line in said)
    assert any(line.startswith("Times the speed of transformers: pictures ") for line in said)
    found = record_in(tmp_path / "records")
    assert re.fullmatch(r"compare-transformers-config-bs4-t1-cpu-\d{8}-\d{6}\.json", found["file"])
    assert found["compare"]["checkpoint"]["sha256"] == found["graphs"]["checkpoint"]["sha256"]
    assert ", BlipForImageTextRetrieval, eager attention, float32" in found["compare"]["with"]
    assert found["compare"]["peak"]["engine"] == "PyTorch"
    works = {work["work"]: work["ways"] for work in found["compare"]["works"]}
    assert {name: [way["items"] for way in ways] for name, ways in works.items()} == {
        "pictures": [4, 4],
        "captions": [38, 38],
        "pairs": [38, 5, 5],
    }
    for ours, *others in works.values():
        assert len(ours["seconds"]) == 3
        for other in others:
            # 4e-7 to 2e-6 measured.
            assert 0 <= other["max_abs_difference"] < 1e-5
            assert other["ours_is_times"] == pytest.approx(ours["per_s"] / other["per_s"], rel=0.01)


def test_works_are_chosen_by_name() -> None:
    assert chosen_works(None) == ["pictures", "captions", "pairs"]
    assert chosen_works("pairs,pictures,pairs") == ["pictures", "pairs"]
    with pytest.raises(Misuse, match="There is no work 'itm' to compare; there are pictures, captions, pairs"):
        chosen_works("pairs,itm")


@pytest.mark.usefixtures("_no_rest")
def test_comparison_of_static_graphs(atc_graphs: Path) -> None:
    checkpoint = atc_graphs.parent / "model" / "model.safetensors"
    said = chain.done(blip_bench(atc_graphs, *COMPARED, "--checkpoint", checkpoint, "--pairs", 7, "--rounds", 1, "--no-record"))
    assert "Captions: 7 random captions of invented length" in said


@pytest.mark.usefixtures("_no_rest")
def test_a_comparison_of_unequal_work_is_refused(ort_graphs: Path, tmp_path: Path) -> None:
    """The checkpoint of another model of the same size."""
    chain.write_model(tmp_path / "other", random_model(seed=1))
    records = tmp_path / "records"
    options = ("--checkpoint", tmp_path / "other" / "model.safetensors", "--record", records)
    found = chain.refusal(blip_bench(ort_graphs, *COMPARED, *options))
    assert re.match(r"The pictures come out differently: transformers: .* differs from our graphs by \d\.\de-0[01], so ", found)
    assert list(records.iterdir()) == []


def test_transformers_missing(ort_graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bench.rival", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = chain.refusal(blip_bench(ort_graphs, *COMPARED, "--checkpoint", tmp_path / "x", "--no-record"))
    assert found.startswith("--compare transformers needs transformers, which is not installed here: pip install ")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--only", "image,imag"), 2, "has no graph 'imag'; it has text_embed, image_embed,"),
        (("--only", ""), 2, "has no graph ''"),
        (("--length", 37), 2, "--length 37 is longer than the 36 positions"),
        (("--provider", "cann"), 1, "has no CANNExecutionProvider"),
        (("--compare", "transformers"), 2, "needs the weights: add --checkpoint"),
        ((*COMPARED, "--checkpoint", "x", "--provider", "cuda"), 2, "leave out --provider cuda"),
        ((*COMPARED, "--checkpoint", "missing.pth"), 1, "There is no checkpoint missing.pth"),
        ((*COMPARED, "--checkpoint", "x", "--captions", "missing.json"), 1, "There is no annotation file missing.json"),
        ((*COMPARED, "--checkpoint", "x", "--length", 36), 2, "--length 36 is longer than the captions of this model, 35 tokens"),
        ((*COMPARED, "--checkpoint", "x", "--works", "itm"), 2, "There is no work 'itm' to compare"),
        (("--captions", "x.json"), 2, "--captions is only read with --compare transformers"),
        (("--vit-checkpoint", "x.pth"), 2, "--vit-checkpoint is only read with --compare transformers"),
        (("--itm-batchsize", 3), 2, "--itm-batchsize is only read with --compare transformers"),
        (("--batchsize", 0), 2, "0 is not in the range x>=1"),
        (("--compare", "tensorflow"), 2, "'tensorflow' is not"),
    ],
)
def test_wrong_commands(ort_graphs: Path, options: tuple[object, ...], code: int, said: str) -> None:
    assert said in chain.refusal(blip_bench(ort_graphs, *options, "--no-record"), code)


def test_folders_that_are_not_there(ort_graphs: Path, tmp_path: Path) -> None:
    found = chain.refusal(blip_bench(tmp_path / "none", "--no-record"))
    assert found.startswith(f"There is no folder {tmp_path / 'none'}. blip-export writes it")
    (tmp_path / "file").write_text("")
    assert "is a file; --record takes a folder" in chain.refusal(blip_bench(ort_graphs, "--record", tmp_path / "file"), 2)
    both = ("--record", tmp_path, "--no-record")
    assert "contradict each other" in chain.refusal(blip_bench(ort_graphs, *both), 2)


def test_a_graph_that_the_comparison_needs_is_missing(ort_graphs: Path, tmp_path: Path) -> None:
    few = chain.with_only(ort_graphs, tmp_path / "few", "image", "text_embed", "itm")
    checkpoint = ort_graphs.parent / "model" / "model.safetensors"
    found = chain.refusal(blip_bench(few, *COMPARED, "--checkpoint", checkpoint, "--no-record"))
    assert "has no graph 'image_kv'" in found
