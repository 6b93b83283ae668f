"""In which precision ATC is to compute each graph, and the files that say so for single operators."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import onnx

from export.cann import FP16, MIXED, ORIGIN, PRECISIONS
from models.errors import Misuse, UserError
from models.spec import GraphSpec

OP_PRECISION, KEEP_LIST, KEEP_MIXLIST = "op_precision.ini", "keep_{}.txt", "keep.json"
# The Ascend recipe's file for texts: the error function of GELU, which ATC takes for one operator, by the faster kernel.
GELU_FAST = "Gelu=high_performance\n"
OP_TYPE = "OpType::"  # opens a line of a keep list that names all operators of a type
KEPT_OF_GRAPH = ".keep_dtype"  # ends the name of a list for one graph
AUDIT = "audit.json"  # stands in a folder of such lists
MIXLISTS = ("black-list", "white-list", "gray-list")


def reads_pictures(spec: GraphSpec) -> bool:
    """Whether a batch of pictures is all that the graph is fed with."""
    return len(spec.inputs) == 1 and len(spec.inputs[0].shape) == 4


def reads_texts(spec: GraphSpec) -> bool:
    """Whether texts are all that the graph is fed with."""
    return all(tensor.dtype == "int64" for tensor in spec.inputs)


def usual_precision(spec: GraphSpec) -> str:
    """An image encoder bears float16. Attention with a mask, and the Q-Former, keep what ATC's lists call sensitive."""
    queries = any(tensor.name == "query_embed" for tensor in spec.outputs)
    return FP16 if reads_pictures(spec) and not queries else MIXED


def precisions_asked(text: str | None, graphs: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """Of --precision `text`, such as fp16,itm=origin: that of all graphs, None for what suits each, and those of single ones by
    name. Raises Misuse for what is no precision, no graph of `graphs`, or there twice."""
    common, own = list[str](), dict[str, str]()
    for part in text.split(",") if text is not None else ():
        graph, named, precision = part.strip().rpartition("=")
        if precision not in PRECISIONS:
            raise Misuse(f"--precision {text} holds {precision!r}, which is not one of {', '.join(PRECISIONS)}.")
        if named and graph not in graphs:
            raise Misuse(f"--precision {text} names {graph!r}, which is none of the graphs to convert: {', '.join(graphs)}.")
        if graph in own or (common and not named):
            raise Misuse(f"--precision {text} says twice what {graph or 'every graph'} is computed in.")
        if named:
            own[graph] = precision
        else:
            common.append(precision)
    return (common[0] if common else None), own


def op_precision_text(file: Path | None) -> str:
    """What op_precision.ini holds: `file`, its last line ended, or the recipe's. Raises Misuse when it is no such list."""
    if file is None:
        return GELU_FAST
    lines = [line.strip() for line in _text(file, "--op-precision").splitlines() if line.strip()]
    wrong = [line for line in lines if "=" not in line and not (line.startswith("[") and line.endswith("]"))]
    if wrong or not lines:
        said = f"the line {wrong[0]!r}" if wrong else "nothing"
        raise Misuse(f"--op-precision {file} holds {said}; expected lines such as Gelu=high_performance.")
    return "\n".join(lines) + "\n"


class Keep:
    """Operators that are to stay in float32: a list of names and types (--keep_dtype), or a list of types in JSON that changes
    ATC's own (--modify_mixlist)."""

    def __init__(self, file: Path) -> None:
        """Raises Misuse when `file` is neither."""
        self.file, text = file, _text(file, "--keep")
        self.is_mixlist = file.suffix == ".json" or text.lstrip().startswith("{")
        self.text = text
        self.lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        if self.is_mixlist:
            self._check_mixlist()
        elif not self.lines:
            raise Misuse(f"--keep {file} names no operator; expected a name, or {OP_TYPE} and a type, in each line.")

    def option(self, graph: str, path: Path, precision: str, files: dict[str, str]) -> list[str]:
        """The option for the graph in `path`, and its file put in `files`. ATC refuses a name that the graph does not have
        (E10016), so a list is cut to the names that it has. Raises Misuse when the precision leaves it without effect."""
        if self.is_mixlist:
            if precision != MIXED:
                raise Misuse(
                    f"--keep {self.file} changes ATC's lists of mixed precision, and {graph} is computed in {precision}. "
                    f"Add --precision {MIXED}, or choose graphs with --only."
                )
            files[KEEP_MIXLIST] = self.text if self.text.endswith("\n") else self.text + "\n"
            return [f"--modify_mixlist={KEEP_MIXLIST}"]
        if precision == ORIGIN:
            raise Misuse(f"--keep {self.file} keeps operators in float32, and --precision {ORIGIN} keeps all of them; give one.")
        names = {node.name for node in onnx.load(path, load_external_data=False).graph.node}
        kept = [line for line in self.lines if line.startswith(OP_TYPE) or line in names]
        if not kept:
            return []
        files[KEEP_LIST.format(graph)] = "\n".join(kept) + "\n"
        return [f"--keep_dtype={KEEP_LIST.format(graph)}"]

    def refuse_unknown(self, files: Mapping[str, str], graphs: Sequence[str]) -> None:
        """Raises Misuse for a name that `files`, as `option` left it for `graphs`, does not hold."""
        if self.is_mixlist:
            return
        kept = {line for graph in graphs for line in files.get(KEEP_LIST.format(graph), "").splitlines()}
        if strange := [line for line in self.lines if line not in kept]:
            raise Misuse(f"--keep {self.file} names {strange[0]!r}, which is no node of {', '.join(graphs)}.")

    def _check_mixlist(self) -> None:
        try:
            values = json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise Misuse(f"--keep {self.file} is not the JSON that --modify_mixlist takes: {error}.") from error
        if not _changes_lists(values):
            raise Misuse(
                f"--keep {self.file} is not the JSON that --modify_mixlist takes, such as "
                '{"black-list": {"to-add": ["SoftmaxV2"]}}.'
            )


def _changes_lists(values: object) -> bool:
    """Whether `values` are lists of ATC with the names of operators that are to be added to them, or removed."""
    if not isinstance(values, dict) or not values or not set(values) <= set(MIXLISTS):
        return False
    changes = list(values.values())
    if not all(isinstance(change, dict) and set(change) <= {"to-add", "to-remove"} for change in changes):
        return False
    lists = [names for change in changes for names in change.values()]
    return all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists)


def keep_lists(path: Path | None, graphs: Sequence[str], exact: Collection[str] = ()) -> dict[str, Keep]:
    """The list for each of `graphs` that has one: `path` for all of them, or from a folder, as `blip-export --audit-fp16` writes
    it, that of the graph's name: none where the audit found nothing, or for those of `exact`, which stay in float32 as a whole.
    Raises Misuse for a folder of something else."""
    if path is None:
        return {}
    if not path.is_dir():
        return dict.fromkeys(graphs, Keep(path))
    found = {name: path / f"{name}{KEPT_OF_GRAPH}" for name in graphs if (path / f"{name}{KEPT_OF_GRAPH}").is_file()}
    if not found and not (path / AUDIT).is_file():
        raise Misuse(f"--keep {path} is a folder without {graphs[0]}{KEPT_OF_GRAPH}, or that of another graph that is converted.")
    return {name: Keep(file) for name, file in found.items() if name not in exact}


def _text(file: Path, option: str) -> str:
    try:
        return file.read_text("utf-8")
    except OSError as error:
        raise UserError(f"{option} {file} cannot be read: {(error.strerror or str(error)).lower()}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{option} {file} is no text in UTF-8: {error}.") from error
