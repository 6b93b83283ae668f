"""A plan carried out: ATC called for every graph, its results checked, om/ written with its manifest last."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from export.atc_call import call, ended_once
from export.atc_errors import SAY
from export.atc_made import NOTES, WEIGHTS, Finished
from export.atc_plan import Plan
from export.atc_script import SCRIPT, script
from models import manifest
from models.errors import Misuse, UserError
from models.om import KIND, SUFFIX, OmEntry, entries, entry_to_dict

SCRIPTED = "atc"  # the kind of a folder that atc.sh has yet to fill
LITTER = ("kernel_meta*", "fusion_result.json", "check_result.json")  # what ATC leaves where it was called


def convert(plan: Plan, out: Path, say: Callable[[str], None]) -> None:
    """Make every .om of `plan` and write `out`.

    Raises UserError when ATC is not installed, fails, or leaves no .om, Misuse when `out` holds graphs that `plan` has not. What
    was finished then, or when a signal ends it, is kept for the next run of the same commands; `out` is as it was.
    """
    _refuse_loss(plan, out)
    atc = shutil.which("atc")
    if atc is None:
        raise UserError(
            "There is no atc on the PATH. Run `source /usr/local/Ascend/ascend-toolkit/set_env.sh` first, or write the commands "
            "for another host with --script."
        )
    with _private(), ended_once(), manifest.new_folder(out, KIND, resumable=True) as folder:
        finished = Finished(folder, plan, atc)
        try:
            made = _make(plan, atc, folder, finished, say)
            finished.close()
            _write_lists(plan, folder)
            _write_beside(plan, folder)
            finished.check(manifest.write(folder, KIND, plan.content(made)).files)
        except BaseException as error:
            finished.sweep()
            if not finished.notes:
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, UserError):
                raise UserError(f"{error.message}; {_left(len(finished))}") from error
            raise
        (folder / NOTES).unlink()


def _make(plan: Plan, atc: str, folder: Path, finished: Finished, say: Callable[[str], None]) -> list[OmEntry]:
    """Call ATC for what is not yet finished; returns the entries of all."""
    made = []
    _write_lists(plan, folder)
    with tqdm(plan.jobs, "atc", unit=" graphs", disable=None) as bar:
        for job in bar:
            bar.set_postfix_str(job.stem)
            note, when = finished.note(job), ", of the last run"
            if note is None:
                for file in finished.make_room(job):
                    say(f"{file} of another command, which was stopped, makes room for {job.stem}.")
                begun = time.monotonic()
                call(atc, job, folder)
                file, when = made_of(job.stem, folder), ""
                note = finished.add(job, file, round(time.monotonic() - begun, 1))
            made += [replace(entry, file=note.file, seconds=note.seconds) for entry in job.entries]
            say(f"{note.file:<32} {(folder / note.file).stat().st_size / 1e6:>9.1f} MB {note.seconds:>8.1f} s{when}")
    return made


def _left(count: int) -> str:
    """What is left of a run that failed."""
    if not count:
        return "nothing was written."
    return f"{count} .om {'file is' if count == 1 else 'files are'} finished and kept: the same command goes on from there."


def _refuse_loss(plan: Plan, out: Path) -> None:
    """Raise Misuse when `out` is complete and has graphs that `plan` has not: they would be lost, and hours of work with them."""
    try:
        held = manifest.read(out, KIND).content["graphs"]
    except (UserError, KeyError):
        return
    if lost := [name for name in held if name not in {job.graph for job in plan.jobs}]:
        raise Misuse(
            f"{out} is complete and holds {', '.join(lost)}, which would be lost: a folder is written as a whole. Choose another "
            "--out, or convert all of its graphs (--precision GRAPH=PRECISION is of one alone)."
        )


def write_script(plan: Plan, out: Path) -> None:
    """Write `out`: atc.sh, the files that it names, and what `collect` needs. Raises Misuse when it holds .om files."""
    if held := sorted(path.name for path in out.glob(f"*{SUFFIX}")):
        mend = "Choose another --out, or remove it yourself."
        if _is(out, SCRIPTED):
            mend = "Give it a manifest with --collect, or choose another --out."
        elif _is(out, KIND):
            mend = f"It is complete: blip-run takes it with --graphs {out}. {mend}"
        raise Misuse(f"{out} holds {held[0]}, which would be lost. {mend}")
    with _private(), manifest.new_folder(out, SCRIPTED) as folder:
        _write_lists(plan, folder)
        _write_beside(plan, folder)
        path = folder / SCRIPT
        path.write_text(script(plan), "utf-8")
        path.chmod(0o750)
        manifest.write(folder, SCRIPTED, plan.content([entry for job in plan.jobs for entry in job.entries]))


def collect(out: Path) -> int:
    """Complete the folder `out`, which atc.sh has filled; returns the number of .om files.

    Raises UserError when one is missing or empty, as before atc.sh has ended; the folder stays as it was then.
    """
    found = manifest.read(out, SCRIPTED)
    made = []
    for entry in entries(found.content, out / manifest.NAME):
        stem = entry.file.removesuffix(SUFFIX)
        if wrong := _wrong(stem, out):
            raise UserError(
                f"{out}: {wrong}; {SCRIPT} has not been run there, or not to its end. Run `bash {SCRIPT}` there, where CANN is "
                "installed, then --collect again; nothing was written."
            )
        made.append(replace(entry, file=made_of(stem, out)))
    with _private():
        _remove_litter(out)
        manifest.write(out, KIND, {**found.content, "oms": [entry_to_dict(entry) for entry in made]})
    return len({entry.file for entry in made})


def made_of(stem: str, folder: Path) -> str:
    """The .om that ATC made under `stem`; it may have added the host's system. Raises UserError for none, or an empty one."""
    if wrong := _wrong(stem, folder):
        raise UserError(f"{stem}: {wrong}, though atc reported success. Is the disk full? {SAY}")
    made = _made(stem, folder)[0]
    for path in (made, *(each for each in folder.glob(f"{WEIGHTS}/**/*") if each.is_file())):
        path.chmod(0o640)  # a script of another release may have made them
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


@contextmanager
def _private() -> Iterator[None]:
    """Files are made 0640 and folders 0750, by ATC too: ais_bench takes none that others may write."""
    before = os.umask(0o027)
    try:
        yield
    finally:
        os.umask(before)


def _write_lists(plan: Plan, folder: Path) -> None:
    """The files that the commands name."""
    for name, text in plan.files.items():
        (folder / name).write_text(text, "utf-8")


def _write_beside(plan: Plan, folder: Path) -> None:
    """The vocabulary."""
    for name in plan.tokenizer:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.source.folder / name, folder / name)


def _remove_litter(folder: Path) -> None:
    for path in (path for pattern in LITTER for path in folder.glob(pattern)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
