"""What `python -m ais_bench` wrote, read again: of both its years, and refused with a file's name where something is wrong.

tests/summaries/ has a summary of each year, written by what is known of the form and not by what the stand-in does. The other
folders are made by the stand-in tests/doubles/ais_bench_cli.py, which is compared with them first, or by AIS_BENCH_SRC.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from models.errors import UserError
from runtime.ais_bench import PADDING, BinFiles, npu_seconds, read_folder
from tests.ais_bench_files import Counted
from tests.om_folder import DOUBLES, GENERATIONS, cast_input, front_end, half_outputs

SUMMARIES = Path(__file__).parent / "summaries"
Found = dict[str, Any]


@pytest.fixture
def counted(tmp_path: Path) -> Counted:
    return Counted(tmp_path)


@pytest.fixture
def made(counted: Counted) -> Counted:
    """Run by the ais_bench of today."""
    assert counted.run("2025").returncode == 0
    return counted


def summary(counted: Counted) -> Found:
    found: Found = json.loads(counted.out.with_name("text_summary.json").read_text("utf-8"))
    return found


def read(counted: Counted, samples: int = 10) -> np.ndarray:
    return np.asarray(read_folder(counted.out, counted.spec, samples, counted.stems, counted.sources)["text_embed"])


def refused(counted: Counted, *says: object) -> None:
    with pytest.raises(UserError) as error:
        read(counted)
    for text in says:
        assert str(text) in error.value.message


def test_a_source_tree_takes_the_place_of_the_stand_in(counted: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command line, too, and not InferSession alone."""
    source = tmp_path / "source"
    shutil.copytree(DOUBLES / "ais_bench", source / "ais_bench", ignore=shutil.ignore_patterns("__pycache__"))
    main = source / "ais_bench" / "__main__.py"
    main.write_text('print("of the source")\n' + main.read_text("utf-8"), "utf-8")
    monkeypatch.delenv("AIS_BENCH_SRC", raising=False)
    assert counted.run("2025").stdout == ""
    monkeypatch.setenv("AIS_BENCH_SRC", str(source))
    assert front_end("2023") == ([str(source), str(DOUBLES)], "2025")  # by what its InferSession has
    done = counted.run("2025")
    assert (done.returncode, done.stdout) == (0, "of the source\n")
    read(counted)


def golden(counted: Counted, generation: str) -> Found:
    """A folder as ais_bench of that year leaves it: its summary, and the outputs beside."""
    counted.out.mkdir(parents=True)
    for stem, row in zip(counted.stems, counted.expected(), strict=True):
        row.tofile(counted.out / f"{stem}_0.bin")
    found: Found = json.loads((SUMMARIES / f"{generation}.json").read_text("utf-8"))
    counted.out.with_name("text_summary.json").write_text(json.dumps(found), "utf-8")
    return found


@pytest.mark.parametrize("generation", GENERATIONS)
def test_golden_summaries(counted: Counted, generation: str) -> None:
    found = golden(counted, generation)
    np.testing.assert_array_equal(read(counted), counted.expected())
    assert npu_seconds(counted.out) == pytest.approx(sum(found["npu_compute_time_list"]) / 1000)
    counted.out.with_name("text_summary.json").rename(counted.out / "sumary.json")  # where it was before November 2022
    np.testing.assert_array_equal(read(counted), counted.expected())


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda files: [files[str(n)]["infiles"].pop() for n in files], "ids/00.bin went with 1 inputs"),
        # mask/03.bin was missing: ais_bench takes the next one, and so on, and fills up at the end.
        (
            lambda files: [files[str(n)]["infiles"].__setitem__(1, f"mask/{n + 1:02d}.bin") for n in range(3, 9)],
            "ids/03.bin went with mask/04.bin",
        ),
        (lambda files: files["9"]["infiles"].__setitem__(1, PADDING), f"ids/09.bin went with {PADDING}"),
        (lambda files: files["4"]["outfiles"].append("out/text/04_1.bin"), "wrote 04_0.bin, 04_1.bin; expected 04_0.bin, once"),
        (lambda files: files.update({"10": {"infiles": ["ids/10.bin", "mask/10.bin"], "outfiles": []}}), "names ids/10.bin"),
    ],
)
def test_golden_summaries_of_what_went_wrong(
    counted: Counted, generation: str, change: Callable[[Found], object], says: str
) -> None:
    found = golden(counted, generation)
    read(counted)  # the control
    change(found["filesinfo"])
    counted.out.with_name("text_summary.json").write_text(json.dumps(found), "utf-8")
    refused(counted, says)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_golden_summary_of_an_int32_file(counted: Counted, generation: str) -> None:
    """Two files of int64 have the bytes of four rows of int32: 280 and 560 of 35 tokens."""
    found = golden(counted, generation)
    found["NPU_compute_time"]["count"] = 5
    counted.out.with_name("text_summary.json").write_text(json.dumps(found), "utf-8")
    refused(counted, "the graph ran 5 times over 10 files", "int32")


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_summary_has_the_golden_form(counted: Counted, generation: str) -> None:
    wanted = json.loads((SUMMARIES / f"{front_end(generation)[1]}.json").read_text("utf-8"))
    assert counted.run(generation, "--outfmt", "BIN", "--batchsize", 4, "--device", 0).returncode == 0
    found = summary(counted)
    assert found.keys() == wanted.keys()
    assert found["filesinfo"] == wanted["filesinfo"]
    assert found["args"][1:] == wanted["args"][1:]
    for part in ("NPU_compute_time", "H2D_latency", "D2H_latency"):
        assert found[part].keys() == wanted[part].keys()
    assert len(found["npu_compute_time_list"]) == found["NPU_compute_time"]["count"] == wanted["NPU_compute_time"]["count"] == 3
    assert found["throughput"] == pytest.approx(4000 / found["NPU_compute_time"]["mean"])
    assert wanted["throughput"] == pytest.approx(4000 / wanted["NPU_compute_time"]["mean"])


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_stand_in_packs_pads_and_names_as_ais_bench_does(counted: Counted, generation: str) -> None:
    done = counted.run(generation, "--batchsize", 4)
    assert done.returncode == 0, done.stderr
    found = summary(counted)
    assert found["NPU_compute_time"]["count"] == 3  # ten files in batches of four
    assert len(list(counted.out.iterdir())) == 10  # nothing of the two rows that fill the last one
    assert found["filesinfo"]["9"] == {"infiles": ["ids/09.bin", "mask/09.bin"], "outfiles": ["out/text/09_0.bin"]}
    assert not (counted.out / "sumary.json").exists()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_outputs_of_both_years(counted: Counted, generation: str) -> None:
    assert counted.run(generation).returncode == 0
    tensor = read_folder(counted.out, counted.spec, 10, counted.stems, counted.sources)["text_embed"]
    assert (len(tensor), tensor.shape, tensor.dtype) == (10, (10, 4), np.float32)
    wanted = counted.expected()
    np.testing.assert_allclose(tensor[:], wanted, rtol=1e-6)
    for index in (3, -1, slice(2, 9, 3), np.array([7, 0, 7]), np.array([[1, 2], [2, 1]])):
        np.testing.assert_array_equal(tensor[index], np.asarray(tensor)[index])
    assert npu_seconds(counted.out) > 0


def test_where_the_summary_may_be(made: Counted) -> None:
    wanted, beside = read(made), made.out.with_name("text_summary.json")
    for name in ("sumary.json", "text_summary.json", "2026_01_02-03_04_05_summary.json"):
        moved = beside.rename(made.out / name)
        np.testing.assert_array_equal(read(made), wanted)
        moved.rename(beside)
    beside.unlink()
    refused(made, made.out, "text_summary.json beside it")


def test_the_order_is_that_of_the_stems(made: Counted) -> None:
    turned = read_folder(made.out, made.spec, 10, made.stems[::-1], made.sources)["text_embed"]
    np.testing.assert_array_equal(turned[:], read(made)[::-1])


@pytest.mark.parametrize("generation", GENERATIONS)
def test_several_devices(counted: Counted, generation: str) -> None:
    """That of 2023 deals the samples out, that of today has each device do them all."""
    assert counted.run(generation, "--device", "0,3").returncode == 0
    generation = front_end(generation)[1]
    names = {"2023": ["device0", "device3"], "2025": ["device0_0", "device3_1"]}[generation]
    assert sorted(path.name for path in counted.out.iterdir() if path.is_dir()) == names
    np.testing.assert_allclose(read(counted), counted.expected(), rtol=1e-6)
    shutil.rmtree(counted.out / names[1])
    if generation == "2023":
        refused(counted, "has no 05_0.bin", "5 of 10 files")


def test_a_file_of_a_whole_batch(counted: Counted) -> None:
    for name, rows in counted.fed.items():
        shutil.rmtree(counted.folder / name)
        counted.write(name, rows, together=4)
    assert counted.run("2025").returncode == 0
    for samples in (10, 12):
        found = read_folder(counted.out, counted.spec, samples, counted.stems[:3], counted.sources)["text_embed"]
        assert found.shape == (samples, 4)
        np.testing.assert_allclose(found[:10], counted.expected(), rtol=1e-6)
        np.testing.assert_array_equal(found[np.array([9, 1, 5])], np.asarray(found)[[9, 1, 5]])


def test_float16_is_widened(counted: Counted) -> None:
    half_outputs(counted.folder / "text.om", counted.spec)
    assert counted.run("2025").returncode == 0
    assert (counted.out / "00_0.bin").stat().st_size == 8
    found = read(counted)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, counted.expected().astype(np.float16).astype(np.float32))


def test_loops_are_no_runs(counted: Counted) -> None:
    assert counted.run("2025", "--loop", 3).returncode == 0
    assert summary(counted)["NPU_compute_time"]["count"] == 9
    np.testing.assert_allclose(read(counted), counted.expected(), rtol=1e-6)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_missing_mask_file(counted: Counted, generation: str) -> None:
    """Every later caption has the next one's mask, and ais_bench ends well."""
    (counted.folder / "mask" / "03.bin").unlink()
    assert counted.run(generation).returncode == 0
    assert summary(counted)["filesinfo"]["3"]["infiles"] == ["ids/03.bin", "mask/04.bin"]
    refused(counted, "ids/03.bin went with mask/04.bin", "mask/03.bin was missing")


def test_inputs_in_another_order(counted: Counted) -> None:
    """Both have the same names and bytes: the numbers would be of no use, and nothing else tells."""
    assert counted.run("2025").returncode == 0
    read(counted)  # the control
    shutil.rmtree(counted.out)
    assert counted.run("2025", "--input", "mask,ids").returncode == 0
    refused(counted, "text_ids of text_embed was fed mask/00.bin; expected the files of a folder ids", "in this order: ids, mask")


@pytest.mark.parametrize(("given", "checked"), [("False", True), ("no", True), ("0", True), ("True", False), ("1", False)])
def test_a_pipeline_that_is_not_one(made: Counted, given: str, checked: bool) -> None:
    """With --pipeline True the files are not packed, and its times are others; an option that says no changes nothing."""
    found = summary(made)
    found["args"] += ["--pipeline", given]
    found["NPU_compute_time"]["count"] = 5
    made.out.with_name("text_summary.json").write_text(json.dumps(found), "utf-8")
    if checked:
        refused(made, "the graph ran 5 times over 10 files")
    else:
        np.testing.assert_allclose(read(made), made.expected(), rtol=1e-6)


def test_nan_is_named_by_its_file(made: Counted) -> None:
    for rows, stem in ((1, "07"), (4, "01")):
        tensor = BinFiles([made.out / f"{name}_0.bin" for name in made.stems], np.dtype("float32"), (10, 4), 1)
        if rows == 4:
            for name in made.fed:
                shutil.rmtree(made.folder / name)
                made.write(name, made.fed[name], together=4)
            shutil.rmtree(made.out)
            assert made.run("2025").returncode == 0
            tensor = BinFiles([made.out / f"{name}_0.bin" for name in made.stems[:3]], np.dtype("float32"), (10, 4), 4)
        tensor.refuse_nan("text_embed")  # the control
        path = made.out / f"{stem}_0.bin"
        np.where(np.arange(4 * rows) == 4 * rows - 2, np.nan, np.fromfile(path, np.float32)).astype(np.float32).tofile(path)
        with pytest.raises(UserError, match=f"{stem}_0.bin holds NaN or infinity: text gave it in text_embed"):
            tensor.refuse_nan("text_embed")


def test_a_mask_file_too_many(counted: Counted) -> None:
    shutil.copy(counted.folder / "mask" / "02.bin", counted.folder / "mask" / "02x.bin")
    assert counted.run("2025").returncode == 0
    refused(counted, "ids/03.bin went with mask/02x.bin", "a file too many stood before it")


def test_the_last_mask_file_missing(counted: Counted) -> None:
    (counted.folder / "mask" / "09.bin").unlink()
    assert counted.run("2025").returncode == 0
    assert summary(counted)["filesinfo"]["9"]["infiles"] == ["ids/09.bin", PADDING]
    refused(counted, f"ids/09.bin went with {PADDING}", "09.bin of text_atten_mask was missing")


def test_a_missing_caption(counted: Counted) -> None:
    for name in counted.fed:
        (counted.folder / name / "04.bin").unlink()
    assert counted.run("2025").returncode == 0
    refused(counted, f"{counted.out} has no 04_0.bin", "1 of 10 files")


def test_a_caption_too_many(counted: Counted) -> None:
    for name in counted.fed:
        shutil.copy(counted.folder / name / "04.bin", counted.folder / name / "99.bin")
    assert counted.run("2025").returncode == 0
    refused(counted, "names ids/99.bin, which is no sample of this data")


def test_dots_in_names(counted: Counted) -> None:
    """ais_bench cuts at the first one, so that all go to one file."""
    for name in counted.fed:
        for path in (counted.folder / name).iterdir():
            path.rename(path.with_name(f"img.{path.name}"))
    assert counted.run("2025").returncode == 0
    assert [path.name for path in counted.out.iterdir()] == ["img_0.bin"]
    refused(counted, "ids/img.00.bin, which is no sample")


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("half", [False, True])
def test_an_int32_file(counted: Counted, generation: str, half: bool) -> None:
    """It takes two files for four rows, ends well, and writes all ten outputs. With float16 they even have float32's bytes."""
    for name in ("text_ids", "text_atten_mask"):
        cast_input(name, TensorProto.INT32)(counted.folder / "text.om", counted.spec)
    if half:
        half_outputs(counted.folder / "text.om", counted.spec)
    done = counted.run(generation)
    assert done.returncode == 0, done.stderr
    assert len(list(counted.out.iterdir())) == 10
    assert (counted.out / "00_0.bin").stat().st_size == (16 if half else 32)
    refused(counted, "text_summary.json: the graph ran 5 times over 10 files", "int32")
    # Nor does it pass where the summary says nothing of runs, unless the bytes are right by chance.
    said = summary(counted)
    del said["NPU_compute_time"]
    counted.out.with_name("text_summary.json").write_text(json.dumps(said), "utf-8")
    if not half:
        refused(counted, counted.out / "00_0.bin", "has 32 bytes", "16 as float32 or 8 as float16")


def cut(made: Counted) -> None:
    path = made.out / "05_0.bin"
    path.write_bytes(path.read_bytes()[:-4])


def half_of_one(made: Counted) -> None:
    path = made.out / "05_0.bin"
    path.write_bytes(path.read_bytes()[:8])


def surplus(made: Counted) -> None:
    shutil.copy(made.out / "05_0.bin", made.out / "10_0.bin")


def second_output(made: Counted) -> None:
    shutil.copy(made.out / "05_0.bin", made.out / "05_1.bin")


def removed(made: Counted) -> None:
    (made.out / "05_0.bin").unlink()


def said(change: Callable[[Found], None]) -> Callable[[Counted], None]:
    """Another summary."""

    def apply(made: Counted) -> None:
        found = summary(made)
        change(found)
        made.out.with_name("text_summary.json").write_text(json.dumps(found), "utf-8")

    return apply


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (cut, ("05_0.bin has 12 bytes", "16 as float32")),
        (half_of_one, ("05_0.bin has 8 bytes", "has 16 as float32. It was cut short")),
        (surplus, ("10_0.bin is no output that ",)),
        (second_output, ("05_1.bin is no output that ",)),
        (removed, ("05_0.bin is missing, though the summary names it",)),
        (said(lambda found: found["filesinfo"].clear()), ("text_summary.json is no summary", "no files")),
        (said(lambda found: found.pop("filesinfo")), ("text_summary.json is no summary", "filesinfo")),
        (said(lambda found: found["filesinfo"].pop("5")), ("05_0.bin",)),
        (said(lambda found: found["filesinfo"]["5"].pop("infiles")), ("text_summary.json is no summary", "infiles")),
        (said(lambda found: found["filesinfo"]["5"]["infiles"].pop()), ("ids/05.bin went with 1 inputs; text_embed takes 2",)),
        (said(lambda found: found["filesinfo"]["5"]["outfiles"].clear()), ("ids/05.bin it wrote nothing; expected 05_0.bin",)),
        (
            said(lambda found: found["filesinfo"]["5"].update(outfiles=["out/text/04_0.bin"])),
            ("ids/05.bin it wrote 04_0.bin; expected 05_0.bin",),
        ),
        (
            said(lambda found: found["filesinfo"].update({"5": found["filesinfo"]["4"]})),
            ("ids/04.bin it wrote 04_0.bin; expected 04_0.bin, once",),
        ),
        (said(lambda found: found.update(NPU_compute_time={"count": 4, "mean": 1.0})), ("ran 4 times over 10 files",)),
    ],
)
def test_what_is_wrong_is_named(made: Counted, change: Callable[[Counted], None], says: tuple[str, ...]) -> None:
    read(made)  # the control
    change(made)
    refused(made, *says)


def test_a_damaged_summary(made: Counted) -> None:
    for text in ("", "[]", "{", "null", '{"filesinfo": {"x": {}}}', "[" * 100_000):
        made.out.with_name("text_summary.json").write_text(text, "utf-8")
        refused(made, "text_summary.json is no summary of ais_bench")


def test_another_format(counted: Counted) -> None:
    assert counted.run("2025", "--outfmt", "NPY").returncode == 0
    refused(counted, "00_0.npy", "--outfmt BIN")


def test_no_folder(counted: Counted) -> None:
    refused(counted, f"There is no folder {counted.out}", "ais_bench.sh")


def test_a_run_that_failed_leaves_an_empty_folder(counted: Counted) -> None:
    (counted.folder / "ids" / "00.bin").write_bytes(b"123")
    assert counted.run("2025").returncode == 1
    assert counted.out.is_dir()
    refused(counted, counted.out, "ais_bench has not come to its end")


def test_the_control_graph_is_the_one_that_ran(counted: Counted) -> None:
    assert [value.name for value in onnx.load(counted.folder / "text.om").graph.input] == ["text_ids", "text_atten_mask"]
    assert len({tuple(row) for row in counted.expected().round(4).tolist()}) == 10
