"""The way to Ascend with the demo's own weights, each command as README has it, over stand-ins for ATC and ais_bench."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import export.__main__
import export.atc
import postprocess.__main__
import preprocess.__main__
import runtime.__main__
from demo import shapes
from runtime.outputs import read_caption, read_retrieval
from tests import chain
from tests.doubles import atc
from tests.om_folder import SOC, ais_bench

ROOT = Path(__file__).parent.parent
WEIGHTS = ("--checkpoint", ROOT / "demo/weights.safetensors", "--tokenizer", ROOT / "demo/tokenizer")
PICTURES, BATCHES = 14, "4,7"  # 7 divides the set and 4 does not


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pictures")
    result = CliRunner().invoke(shapes.main, ["--out", str(out), "--split", "test", "--count", str(PICTURES)])
    assert result.exit_code == 0, result.output
    return out


def exported(root: Path, model: str, *options: object) -> None:
    """blip-export and, of what it wrote, blip-atc."""
    named = ("--model", model, *WEIGHTS, "--target", "ascend", *options, "--out", root / "graphs")
    chain.done(chain.call(export.__main__.main, *named))
    asked = ("--graphs", root / "graphs", "--batchsize", BATCHES)
    assert "can read every graph" in chain.done(chain.call(export.atc.main, "--check", *asked))
    converted(root, root / "om", "--batchsize", BATCHES)


def converted(root: Path, out: Path, *options: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{atc.install(root / 'bin')}{os.pathsep}{os.environ['PATH']}")
        chain.done(chain.call(export.atc.main, "--graphs", root / "graphs", "--soc", SOC, *options, "--out", out))


def prepared(root: Path, task: str, pictures: Path) -> Path:
    named = ("--annotations", pictures / "test.json", "--images", pictures, "--graphs", root / "om", "--out", root / "data")
    chain.done(chain.call(preprocess.__main__.main, task, *named))
    return root / "data"


def test_retrieval(pictures: Path, tmp_path: Path) -> None:
    """At batches that divide the set and that do not, on one NPU and on four: ONNX Runtime's numbers, and its report."""
    exported(tmp_path, "blip-demo", "--graphs", "text_embed,image,image_kv,itm_cached")
    data = prepared(tmp_path, "retrieval", pictures)

    def run(graphs: str, *options: object) -> Path:
        out = tmp_path / f"{graphs}{'-'.join(map(str, options))}"
        named = ("retrieval", "--graphs", tmp_path / graphs, "--data", data, "--k-test", 5, "--out", out)
        chain.done(chain.call(runtime.__main__.main, *named, *options))
        return out

    wanted = run("graphs", "--batchsize", 7)
    report = chain.recall(wanted, tmp_path / "report")
    for generation, options in (("2023", (7,)), ("2025", (4,)), ("2025", (7, "--device", "0,1,2,3"))):
        with ais_bench(generation):
            found = run("om", "--batchsize", *options)
        ours, theirs = read_retrieval(found), read_retrieval(wanted)
        for name in ("pair_image", "pair_text"):
            np.testing.assert_array_equal(getattr(ours, name)[:], getattr(theirs, name)[:])
        for name in ("image_embed", "text_embed", "itm_logits"):
            # A batch that is filled up is another product than one that is not: the last digit may differ, and did by 0.
            np.testing.assert_allclose(getattr(ours, name)[:], getattr(theirs, name)[:], rtol=0, atol=1e-5)
        assert chain.recall(found, tmp_path / f"report-{generation}{len(options)}") == report
    # With the weights beside the .om files: the same bytes.
    converted(tmp_path, tmp_path / "beside", "--batchsize", 7, "--external-weight")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "beside/weight").iterdir()} == {0o640}
    with ais_bench("2025"):
        found = run("beside", "--batchsize", 7)
    for name in ("image_embed.npy", "text_embed.npy", "itm_logits.npy"):
        assert (found / name).read_bytes() == (tmp_path / "om--batchsize-7---device-0,1,2,3" / name).read_bytes()


def test_retrieval_at_several_text_lengths(pictures: Path, tmp_path: Path) -> None:
    """The same pairs and the same report from files for 8, 16, 24 and 35 tokens, of which a short caption takes a short one."""
    exported(tmp_path, "blip-demo", "--graphs", "text_embed,image,image_kv,itm_cached", "--length", "open")
    assert "can read" in chain.done(
        chain.call(export.atc.main, "--check", "--graphs", tmp_path / "graphs", "--length", "buckets")
    )
    converted(tmp_path, tmp_path / "buckets", "--batchsize", BATCHES, "--length", "buckets")
    assert {f"itm_cached_bs7{end}.om" for end in ("", "_len8", "_len16", "_len24")} <= {
        path.name for path in (tmp_path / "buckets").iterdir()
    }
    data, found = prepared(tmp_path, "retrieval", pictures), []
    for graphs in ("om", "buckets"):
        out = tmp_path / f"outputs-{graphs}"
        with ais_bench("2025"):
            aclruntime = importlib.import_module("aclruntime")
            aclruntime.ran.clear()
            named = ("retrieval", "--graphs", tmp_path / graphs, "--data", data, "--k-test", 5, "--batchsize", 7, "--out", out)
            chain.done(chain.call(runtime.__main__.main, *named))
        assert any("_len" in name for name in aclruntime.ran) == (graphs == "buckets")
        found.append((read_retrieval(out), chain.recall(out, tmp_path / f"report-{graphs}")))
    (ours, report), (theirs, wanted) = found
    assert report == wanted
    for name in ("pair_image", "pair_text"):
        np.testing.assert_array_equal(getattr(ours, name)[:], getattr(theirs, name)[:])
    for name in ("text_embed", "itm_logits"):
        np.testing.assert_allclose(getattr(ours, name)[:], getattr(theirs, name)[:], rtol=0, atol=1e-5)


def test_captions(pictures: Path, tmp_path: Path) -> None:
    exported(tmp_path, "blip-caption-demo", "--beams", 3)
    data = prepared(tmp_path, "caption", pictures)
    found = []
    for graphs, more in (("graphs", ()), ("om", ("--device", "0,1"))):
        out = tmp_path / f"outputs-{graphs}"
        named = ("caption", "--graphs", tmp_path / graphs, "--data", data, "--prompt", "", "--max-length", 36, "--out", out)
        with ais_bench("2025"):
            chain.done(chain.call(runtime.__main__.main, *named, "--batchsize", 7, *more))
        found.append(read_caption(out).captions)
    assert found[0] == found[1]
    assert len({row["caption"] for row in found[0]}) > PICTURES / 2
    report = chain.call(
        postprocess.__main__.main, "--captions", "--outputs", tmp_path / "outputs-om", "--out", tmp_path / "report"
    )
    assert "CIDEr" in chain.done(report)
