"""A captioning run: each picture described, after a prompt of its own or one for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models import manifest
from models.errors import Misuse, UserError
from preprocess.dataset import CaptionData, read_caption
from preprocess.lines import read_prompts
from runtime import text_run
from runtime.generation_presets import Settings, settings_for
from runtime.generator import Request
from runtime.graphs import read_graphs
from runtime.how import Writing
from runtime.listed import Listed, list_pictures
from runtime.outputs import CAPTION, CAPTIONS
from runtime.place import placed
from runtime.prompts import caption_prompt, paired, split_at_commas
from runtime.rows import Row
from runtime.run import refuse_mixed, refuse_model
from runtime.text_run import Job, on_one_line, reader, run_texts


@dataclass(frozen=True, kw_only=True)
class Options(text_run.Options):
    """What the user asked of a captioning run."""

    prompts: str | None = None  # one for each picture of `images`, with commas between
    prompts_file: Path | None = None  # one for each picture, one a line


def run_caption(options: Options, say: Callable[[str], None]) -> manifest.Manifest:
    """Write outputs/; goes on where a stopped run ended, and does nothing when the same run is complete. What is written about
    pictures that the command line names is said, too.

    Raises Misuse for options that cannot be, UserError when graphs and data do not fit each other, or the work fails.
    """
    graphs = read_graphs(options.graphs, options.verify)
    refuse_model(graphs, CAPTION)
    settings = settings_for(graphs.config, CAPTION, options.preset, options.asked)
    graphs = placed(graphs, options.provider, options.device, options.batchsize)
    data: CaptionData | Listed
    if options.images is None:
        data = read_caption(options.data, options.verify)
        refuse_mixed(graphs, data)
    else:
        data = list_pictures(options.images, CAPTION)
    prompts = [caption_prompt(text, settings, graphs.config.protocol.max_words) for text in prompts_of(options, settings, data)]

    def results(rows: list[Row]) -> tuple[str, list[Row]]:
        return CAPTIONS, [{"image_id": data.images[row["image"]]["image_id"], "caption": row["texts"][0]} for row in rows]

    job = Job(
        task=CAPTION,
        stage="captions",
        key="image",
        graphs=graphs,
        data=data,
        read=reader(data, graphs),
        requests=[Request(number, number, prompt) for number, prompt in enumerate(prompts)],
        how=Writing(settings),
        results=results,
    )
    done, rows = run_texts(job, options, say)
    if options.images is not None:
        for row in rows:
            say(on_one_line(f"{data.images[row['image']]['image']}: {' | '.join(row['texts'])}"))
    return done


def prompts_of(options: Options, settings: Settings, data: CaptionData | Listed) -> list[str]:
    """The prompt of each picture: those of the command line, else those of the data, else one for all.

    Raises Misuse when they come from two places; it, or UserError for a file's, when there are not as many as pictures.
    """
    given = {"--prompt": "prompt" in options.asked, "--prompts": options.prompts is not None}
    given["--prompts-file"] = options.prompts_file is not None
    named = [name for name, there in given.items() if there]
    if len(named) > 1:
        raise Misuse(f"Both {named[0]} and {named[1]} are given; choose one.")
    count = len(data.images)
    if options.prompts is not None:
        if options.images is None:
            raise Misuse("--prompts goes with --images. For the pictures of a data folder give --prompts-file, or --prompt.")
        return paired(count, split_at_commas(options.prompts), "prompts", parted=True)
    if options.prompts_file is not None:
        texts = read_prompts(options.prompts_file)
        if len(texts) != count:
            raise UserError(f"{options.prompts_file} holds {len(texts):,} prompts for {count:,} pictures; expected one for each.")
        return texts
    if isinstance(data, CaptionData) and data.prompts is not None and not given["--prompt"]:
        return data.prompts
    return [settings.prompt] * count
