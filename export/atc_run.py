"""A plan carried out: ATC called for every graph, its results checked, om/ written with its manifest last."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from export.atc_command import Job
from export.atc_errors import failure
from export.atc_plan import Plan
from export.atc_script import SCRIPT, script
from models import manifest
from models.errors import Misuse, UserError
from models.om import KIND, SUFFIX, entries, entry_to_dict

SCRIPTED = "atc"  # the kind of a folder that atc.sh has yet to fill
WEIGHTS = "weight"  # where ATC puts what --external_weight takes out of an .om
LITTER = ("kernel_meta*", "fusion_result.json", "check_result.json")  # what ATC leaves where it was called


def convert(plan: Plan, out: Path, say: Callable[[str], None]) -> None:
    """Make every .om of `plan` and write `out`.

    Raises UserError when ATC is not installed, fails, or leaves no .om; nothing is left behind then.
    """
    atc = shutil.which("atc")
    if atc is None:
        raise UserError(
            "There is no atc on the PATH. Run `source /usr/local/Ascend/ascend-toolkit/set_env.sh` first, or write the commands "
            "for another host with --script."
        )
    with manifest.new_folder(out, KIND) as folder:
        _write_beside(plan, folder)
        made = []
        with tqdm(plan.jobs, "atc", unit=" graphs", disable=None) as bar:
            for job in bar:
                bar.set_postfix_str(job.stem)
                begun = time.monotonic()
                _call(atc, job, folder)
                seconds, file = round(time.monotonic() - begun, 1), made_of(job.stem, folder)
                made += [replace(entry, file=file, seconds=seconds) for entry in job.entries]
                say(f"{file:<32} {(folder / file).stat().st_size / 1e6:>9.1f} MB {seconds:>8.1f} s")
        _complete(folder, plan.content(made))


def write_script(plan: Plan, out: Path) -> None:
    """Write `out`: atc.sh, the files that it names, and what `collect` needs. Raises Misuse when it holds .om files."""
    if held := sorted(path.name for path in out.glob(f"*{SUFFIX}")):
        mend = "Choose another --out, or remove it yourself."
        if _is(out, SCRIPTED):
            mend = "Give it a manifest with --collect, or choose another --out."
        elif _is(out, KIND):
            mend = f"It is complete: blip-run takes it with --graphs {out}. {mend}"
        raise Misuse(f"{out} holds {held[0]}, which would be lost. {mend}")
    with manifest.new_folder(out, SCRIPTED) as folder:
        _write_beside(plan, folder)
        path = folder / SCRIPT
        path.write_text(script(plan), "utf-8")
        path.chmod(0o755)
        manifest.write(folder, SCRIPTED, plan.content([entry for job in plan.jobs for entry in job.entries]))


def collect(out: Path) -> int:
    """Complete the folder `out`, which atc.sh has filled; returns the number of .om files.

    Raises UserError when one is missing or empty, as before atc.sh has ended; the folder stays as it was then.
    """
    found = manifest.read(out, SCRIPTED)
    made = []
    for entry in entries(found.content):
        stem = entry.file.removesuffix(SUFFIX)
        if wrong := _wrong(stem, out):
            raise UserError(
                f"{out}: {wrong}; {SCRIPT} has not been run there, or not to its end. Run `bash {SCRIPT}` there, where CANN is "
                "installed, then --collect again; nothing was written."
            )
        made.append(replace(entry, file=made_of(stem, out)))
    _complete(out, {**found.content, "oms": [entry_to_dict(entry) for entry in made]})
    return len({entry.file for entry in made})


def made_of(stem: str, folder: Path) -> str:
    """The .om that ATC made under `stem`; it may have added the host's system. Raises UserError for none, or an empty one."""
    if wrong := _wrong(stem, folder):
        raise UserError(
            f"{stem}: {wrong}, though atc reported success. Is the disk full? See its log in ~/ascend/log, or run it with "
            "--log=debug; nothing was written."
        )
    made = _made(stem, folder)[0]
    for path in (made, *folder.glob("weight/*")):
        path.chmod(0o640)  # ais_bench takes no file that others may write
    return made.name


def _made(stem: str, folder: Path) -> list[Path]:
    # Not stem*: text_embed_bs1 would find text_embed_bs16.om.
    return sorted(path for path in (folder / f"{stem}{SUFFIX}", *folder.glob(f"{stem}_linux_*{SUFFIX}")) if path.is_file())


def _wrong(stem: str, folder: Path) -> str:
    """What is wrong with the .om of `stem`; empty when nothing is."""
    made = _made(stem, folder)
    if not made:
        return f"there is no {stem}{SUFFIX}"
    return "" if made[0].stat().st_size else f"{made[0].name} is empty"


def _is(folder: Path, kind: str) -> bool:
    """Whether `folder` is complete, and of that kind."""
    try:
        manifest.read(folder, kind)
    except UserError:
        return False
    return True


def _call(atc: str, job: Job, folder: Path) -> None:
    command = [atc, *job.argv[1:]]
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    if done.returncode:
        raise failure(job.stem, done.returncode, done.stdout)


def _write_beside(plan: Plan, folder: Path) -> None:
    """The vocabulary and the files that the commands name."""
    for name, text in plan.files.items():
        (folder / name).write_text(text, "utf-8")
    for name in plan.tokenizer:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.source.folder / name, folder / name)


def _complete(folder: Path, content: Mapping[str, Any]) -> None:
    for path in (path for pattern in LITTER for path in folder.glob(pattern)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    manifest.write(folder, KIND, dict(content))
