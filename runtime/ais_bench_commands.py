"""The commands of blip-run for retrieval that ais_bench runs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from models.errors import Command
from models.recipe import RECIPES, wanted
from runtime.ais_bench_bash import SCRIPT
from runtime.ais_bench_pairs import Options as PairsOptions
from runtime.ais_bench_pairs import write_pairs
from runtime.ais_bench_run import AIS, PAIRS
from runtime.ais_bench_script import Options as ScriptOptions
from runtime.ais_bench_script import write_script
from runtime.place import LARGEST

FOLDER = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)
DATA = click.option("--data", type=FOLDER, default=Path("build/data"), help="Folder of `blip-pre retrieval --layout files`.")
AS = click.option(
    "--as", "recipe", type=click.Choice(list(RECIPES)), help="Whose evaluation to follow: k_test 20, of ascend-modelzoo."
)


@click.command("ais-bench-script", cls=Command, context_settings={"show_default": True})
@click.option("--om", type=FOLDER, default=Path("build/om"), help="Folder that blip-atc wrote.")
@DATA
@click.option("--out", type=FOLDER, default=Path("build/ais_bench"), help=f"Folder to write: {SCRIPT} and its manifest.")
@click.option("--batchsize", type=COUNT, default=16, help="Which of the files that blip-atc made of a graph.")
@click.option("--itm-batchsize", type=COUNT, default=64, help="The same of itm_cached: captions of one picture.")
@click.option("--device", type=click.IntRange(0, LARGEST), default=0, help="NPU.")
@click.option("--k-test", type=COUNT, default=None, help="Candidates that will be re-ranked.  [default: the model's]")
@AS
def ais_bench_script(recipe: str | None, **asked: Any) -> None:
    """Write the commands that run retrieval's graphs with `python -m ais_bench`, where this package is not installed."""
    asked["k_test"] = wanted(recipe, "k_test", asked["k_test"])
    write_script(ScriptOptions(**asked), click.echo)
    click.echo(f"Run on the host of the NPU: bash {asked['out'] / SCRIPT}")


@click.command("pairs", cls=Command, context_settings={"show_default": True})
@DATA
@click.option("--ais-bench", type=FOLDER, default=Path("build/ais_bench") / AIS, help=f"What {SCRIPT} has left.")
@click.option("--k-test", type=COUNT, default=None, help="Candidates re-ranked per query.  [default: the script's]")
@click.option("--rows", type=COUNT, default=None, help="Captions of a picture in a batch.  [default: what itm_cached takes]")
@click.option("--out", type=FOLDER, default=None, help=f"Folder to write.  [default: {PAIRS} beside --ais-bench]")
@AS
def pairs(recipe: str | None, **asked: Any) -> None:
    """Choose the candidates from embeddings that ais_bench wrote, and write them as files for its second stage.

    Keys and values of a picture, 42 MB of BLIP base, are linked to the files of image_kv; where the disk allows no links they
    are copied. What that takes is said before it begins, and refused when the disk has not the space.
    """
    asked["k_test"] = wanted(recipe, "k_test", asked["k_test"])
    click.echo(f"Pairs: {write_pairs(PairsOptions(**asked), click.echo)}")
