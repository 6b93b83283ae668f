"""blip-export: a checkpoint to ONNX graphs, each compared with the PyTorch module it came from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from export.targets import ASCEND, DEFAULT_OPSET, OPEN, OPSETS, ORT, REWRITES, STATIC, TARGETS
from models import presets
from models.config import Blip2LlmConfig, BlipVqaConfig, Config, RetrievalConfig
from models.config_file import from_file
from models.errors import Command, Misuse, extra
from models.llm_config import T5Config
from models.spec import graph_specs

OPSETS_SAID = ", ".join(f"{opset} for {target}" for target, opset in DEFAULT_OPSET.items())


class Length(click.IntRange):
    """A number of tokens, or OPEN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == OPEN:
            return value
        if not str(value).lstrip("+-").isdecimal():
            self.fail(f"{value!r} is neither a number of tokens nor '{OPEN}'.", param, ctx)
        return super().convert(value, param, ctx)


@click.command(cls=Command, context_settings={"show_default": True})
@click.option(
    "--model", default=None, help=f"Preset: {', '.join(presets.PRESETS)}; or what others call them: {', '.join(presets.ALIASES)}."
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Sizes from a JSON file instead.",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    required=True,
    help="Of BLIP or BLIP-2: an original .pth, a Hugging Face folder or .safetensors, or our own .safetensors.",
)
@click.option(
    "--vit-checkpoint",
    type=click.Path(path_type=Path),
    default=None,
    help="The image encoder of BLIP-2, when --checkpoint has none.",
)
@click.option(
    "--llm-checkpoint",
    type=click.Path(path_type=Path),
    default=None,
    help="The language model of BLIP-2's second stage, a Hugging Face folder, when --checkpoint has none.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder with vocab.txt or tokenizer.json, of a language model with its vocabulary; or that file.",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/graphs"), help="Folder to write.")
@click.option("--graphs", default=None, help="Only these, with commas between.  [default: all]")
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    default=ORT,
    help="ort: dynamic axes, for ONNX Runtime. ascend: fixed axes but the batch, which blip-atc fixes for Ascend's converter. "
    "atc: all axes fixed.",
)
@click.option("--opset", type=int, default=None, help=f"ONNX opset.  [default: {OPSETS_SAID}]")
@click.option("--batchsize", type=click.IntRange(min=1), default=None, help="Fixed batch, --target atc only.  [default: 1]")
@click.option(
    "--length",
    type=Length(min=3),
    default=None,
    help="Fixed length of captions, questions or prompts in tokens, for graphs and data, --target atc and ascend only; or "
    f"'{OPEN}', of retrieval graphs for --target ascend: any length up to the model's, which blip-atc --length fixes.  "
    "[default: the model's]",
)
@click.option(
    "--beams",
    type=click.IntRange(min=1),
    default=None,
    help="Fixed number of texts that are written at once for one prompt, --target atc and ascend only.  [default: 1]",
)
@click.option(
    "--slots",
    type=click.IntRange(min=1),
    default=None,
    help="Places of the buffer for what the decoder has read and written, --target atc and ascend only.  "
    "[default: the longest prompt and 30 words]",
)
@click.option(
    "--rewrites",
    default=None,
    help=f"Forms of the same computation for an NPU, with commas between: {', '.join(REWRITES)}; --target atc and ascend only.",
)
@click.option(
    "--audit-fp16",
    is_flag=True,
    help="Try float16 on every graph, operation by operation, and list what must stay in float32, for blip-atc --keep; "
    "--target atc and ascend only.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    default=None,
    help="Folder of pictures to try it on.  [default: random ones]",
)
def main(
    model: str | None,
    config_file: Path | None,
    checkpoint: Path,
    vit_checkpoint: Path | None,
    llm_checkpoint: Path | None,
    tokenizer: Path,
    out: Path,
    graphs: str | None,
    target: str,
    opset: int | None,
    batchsize: int | None,
    length: int | str | None,
    beams: int | None,
    slots: int | None,
    rewrites: str | None,
    audit_fp16: bool,
    calibration: Path | None,
) -> None:
    """Cut the model in CHECKPOINT into ONNX graphs and say how far each is from it."""
    if (model is None) == (config_file is None):
        raise Misuse(
            f"Name the model with --model PRESET or its sizes with --config FILE.json. Presets: {', '.join(presets.PRESETS)}."
        )
    config = from_file(config_file) if config_file else presets.preset(str(model))
    opset = DEFAULT_OPSET[target] if opset is None else opset
    if opset not in OPSETS[target]:
        raise Misuse(f"--target {target} writes opsets {OPSETS[target][0]} to {OPSETS[target][-1]}, asked was {opset}.")
    static, forms = target in STATIC, _rewrites(rewrites)
    if length == OPEN and (target != ASCEND or not isinstance(config, RetrievalConfig)):
        raise Misuse(
            f"--length {OPEN} is of retrieval graphs for --target {ASCEND}, of which blip-atc makes a file for each length. "
            f"Graphs that write words have one length, those of --target {ORT} take any."
        )
    if not static and (batchsize or length):
        raise Misuse(
            "--batchsize and --length fix axes, which only --target atc does; the graphs of --target ort take any batch."
        )
    if target == ASCEND and batchsize:
        raise Misuse("--target ascend leaves the batch open: give --batchsize to blip-atc, or --target atc here.")
    if (beams or slots) and (not static or isinstance(config, RetrievalConfig)):
        raise Misuse("--beams and --slots fix axes of graphs that write words, which only --target atc and ascend do.")
    if forms and not static:
        raise Misuse("--rewrites are of graphs for Ascend: give --target ascend, or leave them out.")
    if audit_fp16 and not static:
        raise Misuse("--audit-fp16 tries float16 on graphs for Ascend: give --target ascend, or leave it out.")
    if calibration and not audit_fp16:
        raise Misuse("--calibration names pictures for --audit-fp16; give both, or leave it out.")
    if isinstance(length, int):
        config = _shortened(config, length)
    known = graph_specs(config, static=static)
    # Each once, however often it was typed.
    names = list(dict.fromkeys(name.strip() for name in graphs.split(","))) if graphs is not None else list(known)
    with extra("torch"):
        from export.write import Options, write_graphs
    called = presets.ALIASES.get(model, model) if model else str(config_file)
    files = (checkpoint, vit_checkpoint, llm_checkpoint, tokenizer, out)
    sizes = (batchsize or 1, beams or 1, slots)
    of_rewrites = (forms, audit_fp16, calibration)
    asked = Options(called, config, *files, names, target, opset, *sizes, *of_rewrites, open_length=length == OPEN)
    write_graphs(asked, click.echo)
    click.echo(f"{len(names)} graphs, opset {opset}, target {target}: {out}")


def _rewrites(given: str | None) -> list[str]:
    """Each once, in the order they are named. Raises Misuse for one that is none."""
    names = list(dict.fromkeys(name.strip() for name in given.split(","))) if given is not None else []
    if unknown := [name for name in names if name not in REWRITES]:
        raise Misuse(f"There is no rewrite {unknown[0]!r}; known rewrites: {', '.join(REWRITES)}.")
    return names


def _shortened(config: Config, length: int) -> Config:
    """The configuration for texts of `length` tokens, so that they are cut as the graphs need them. A deviation from the
    model's own length is said on screen. Raises Misuse when the model's texts are not that long; T5's prompts have no limit."""
    longest, texts = config.protocol.max_length, _texts(config)
    if length > longest and not (isinstance(config, Blip2LlmConfig) and isinstance(config.llm, T5Config)):
        raise Misuse(f"--length {length} is longer than the {texts} of this model, {longest} tokens.")
    if length < longest:
        said = f"--length {length} deviates from the model's protocol, {longest} tokens"
        then = "will be cut, and the figures will differ" if isinstance(config, RetrievalConfig) else "will be refused"
        click.echo(f"Warning: {said}; longer {texts} {then}.", err=True)
    return dataclasses.replace(config, protocol=dataclasses.replace(config.protocol, max_length=length))


def _texts(config: Config) -> str:
    """What the model reads."""
    if isinstance(config, RetrievalConfig):
        return "captions"
    return "questions" if isinstance(config, BlipVqaConfig) else "prompts"


if __name__ == "__main__":
    main()
