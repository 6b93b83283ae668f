"""Running a graph in ONNX Runtime, on the processor that was asked for and on no other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from models.engine import DISABLED_OPTIMIZERS
from models.errors import UserError
from models.spec import GraphSpec, TensorSpec

PROVIDER_NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "cann": "CANNExecutionProvider"}
PACKAGES = {"cpu": "onnxruntime", "cuda": "onnxruntime-gpu", "cann": "onnxruntime-cann"}
DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(float16)": "float16"}


class OnnxBackend:
    """One .onnx file in one ONNX Runtime session."""

    def __init__(self, path: Path, spec: GraphSpec, provider: str, threads: int | None) -> None:
        """`threads`: of one operator; None leaves the choice to ONNX Runtime. Raises UserError, see open_session."""
        wanted = available_provider(provider)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        if provider == "cann":  # else what it does not know would run on the CPU, and nothing would say so
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            self.session = onnxruntime.InferenceSession(
                str(path),
                options,
                providers=[wanted],
                disabled_optimizers=DISABLED_OPTIMIZERS.get(provider, []),
                enable_fallback=0,  # after a failure it would go on with the CPU
            )
        except Exception as error:  # onnxruntime's own classes share no base but Exception
            if "fallback to CPU EP has been explicitly disabled" in str(error):
                raise UserError(
                    f"{path} has operators that {wanted} does not run, and would leave to the CPU. Export the graphs with "
                    "--target ascend, whose operators CANN knows, or compile them with blip-atc and run the om/ folder."
                ) from error
            raise UserError(f"{path} cannot be loaded: {_first_line(error)} Write the graphs again with blip-export.") from error
        if self.session.get_providers()[0] != wanted:
            raise UserError(
                f"ONNX Runtime could not start {wanted} and fell back to {self.session.get_providers()[0]}; check its driver."
            )
        self.spec = spec  # as the file has it
        self.device = provider  # where outputs may stay: ONNX Runtime's devices bear the names of the providers
        self._outputs = [t.name for t in spec.outputs]
        self._check(path)

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        try:
            found: list[np.ndarray] = self.session.run(self._outputs, feeds)
        except Exception as error:
            raise failure(self.spec, error) from error
        return found

    def _check(self, path: Path) -> None:
        for kind, found, wanted in (
            ("inputs", self.session.get_inputs(), self.spec.inputs),
            ("outputs", self.session.get_outputs(), self.spec.outputs),
        ):
            read = tuple(TensorSpec(v.name, DTYPES.get(v.type, v.type), tuple(v.shape)) for v in found)
            if read != wanted:
                raise UserError(
                    f"{path} has the {kind} {read}, its manifest says {wanted}. Write the graphs again with blip-export."
                )


def available_provider(provider: str) -> str:
    """ONNX Runtime's name of `provider`. Raises UserError when this installation does not have it."""
    name = PROVIDER_NAMES[provider]
    available = onnxruntime.get_available_providers()
    if name not in available:
        raise UserError(
            f"ONNX Runtime here has no {name}, only {', '.join(available)}. "
            f"Install {PACKAGES[provider]} instead of onnxruntime, or use --provider cpu."
        )
    return name


def failure(spec: GraphSpec, error: Exception) -> UserError:
    """What a user is told of an error in the engine."""
    return UserError(f"{spec.name} failed in ONNX Runtime: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [type(error).__name__]
    return text[0].rstrip(".") + "."
