"""Pictures to a data/ folder for captioning: the tensor img, and beside it the captions that people wrote and the prompts.

N pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import manifest
from preprocess.captioned import Captioned
from preprocess.pictures import Options, find_broken, open_config, picture_protocol, with_interpolation, write_pictures


@dataclass(frozen=True)
class WrittenCaptions:
    """What a run has written."""

    pictures: int  # N
    references: int  # captions that people wrote, of all pictures
    prompts: bool  # whether each picture has one of its own
    broken: list[dict[str, Any]]  # pictures left out: {"image", "entry", "reason"}


def write_caption(found: Captioned, graphs: Path, out: Path, options: Options) -> WrittenCaptions:
    """Write the data/ folder `out` from pictures (preprocess.captioned) and the graphs/ folder that will read it. Texts are
    kept as annotated: blip-run makes tokens of them.

    Raises UserError, and leaves an older `out` as it was, when the graphs cannot be read, when a picture is broken and
    `options.skip_broken` is not set, or when nothing remains.
    """
    config, tokenizer = open_config(graphs)
    config = with_interpolation(config, options.interpolation)
    found = found.first(options.limit)
    broken = find_broken(found.pictures, options)  # before anything is decoded
    with manifest.new_folder(out, "data", task="caption") as folder:
        written = write_pictures(folder, found.pictures, broken, config, options)
        references = [found.references[i] for i in written.kept]
        prompts = found.prompts and [found.prompts[i] for i in written.kept]
        content = {
            "task": "caption",
            "layout": options.layout,
            "tensors": {"img": written.img},
            "protocol": picture_protocol(config, tokenizer),
            "images": [{**image, "image_id": found.ids[i]} for i, image in zip(written.kept, written.images, strict=True)],
            "references": references,
            **({"prompts": prompts} if prompts else {}),
            "broken": written.broken,
            "source": found.source,
        }
        manifest.write(folder, "data", content)
    return WrittenCaptions(len(references), sum(map(len, references)), bool(prompts), written.broken)
