"""InferSession as it was in 2023 and as it is in 2025: what they take and what they are called differs."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

import aclruntime
import numpy as np


class _Session:
    def __init__(
        self, device_id: int, model_path: str, acl_json_path: str | None = None, debug: bool = False, loop: int = 1
    ) -> None:
        options = aclruntime.session_options()
        options.log_level, options.loop = 1 if debug else 2, loop
        self.device_id, self.model_path = device_id, model_path
        self.session = aclruntime.InferenceSession(model_path, device_id, options)

    def get_inputs(self) -> list[Any]:
        return self.session.get_inputs()

    def get_outputs(self) -> list[Any]:
        return self.session.get_outputs()

    def set_dynamic_batchsize(self, batch: int) -> None:
        self.session.set_dynamic_batchsize(batch)

    def set_dynamic_dims(self, dims: str) -> None:
        self.session.set_dynamic_dims(dims)

    def run(self, feeds: list[Any], out_array: bool = False) -> list[Any]:
        pointed = [
            aclruntime.BaseTensor(feed.__array_interface__["data"][0], feed.nbytes) if isinstance(feed, np.ndarray) else feed
            for feed in feeds
        ]
        found = self.session.run([described.name for described in self.get_outputs()], pointed)
        if not out_array:
            return found
        for tensor in found:
            tensor.to_host()
        return [np.array(tensor) for tensor in found]


class Session2023(_Session):
    """Takes any sequence, and arrays as they lie in memory: of a transposed one, other numbers."""

    def infer(self, feeds: list[Any], mode: str = "static", custom_sizes: int = 100000) -> list[np.ndarray]:
        return self.run(feeds, out_array=True)

    def sumary(self) -> Any:
        return self.session.sumary()

    def reset_sumaryinfo(self) -> None:
        self.session.reset_sumaryinfo()

    def finalize(self) -> None:
        self.session.finalize()


def is_owned(path: Path) -> bool:
    """Whether a file is this user's, or of one of their groups."""
    return path.stat().st_uid == os.geteuid() or path.stat().st_gid in os.getgroups()


def refuse_path(path: Path) -> None:
    """What common/path_security_check.py of 2025 asks of the path of a model."""
    plain = re.fullmatch(r"[A-Za-z0-9_./-]+", str(path)) is not None
    if (
        not plain
        or not is_owned(path)
        or path.is_symlink()
        or path.suffix != ".om"
        or path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        raise ValueError(f"model path:{path} is illegal")


class Session2025(_Session):
    """Takes a list and nothing else, checks where the model lies, and puts arrays in a row."""

    def __init__(
        self, device_id: int, model_path: str, acl_json_path: str | None = None, debug: bool = False, loop: int = 1
    ) -> None:
        if not isinstance(device_id, int) or not 0 <= device_id <= 255:
            raise ValueError("device_id value should be in [0, 255]")
        refuse_path(Path(model_path))
        super().__init__(device_id, model_path, acl_json_path, debug, loop)

    def infer(
        self, feeds: list[Any], mode: str = "static", custom_sizes: int = 100000, out_array: bool = True
    ) -> list[np.ndarray]:
        if not isinstance(feeds, list):
            raise ValueError("the list be checked is not a list!")
        self.session.set_staticbatch()
        return self.run([np.ascontiguousarray(feed) for feed in feeds], out_array)

    def summary(self) -> Any:
        return self.session.sumary()

    def reset_summaryinfo(self) -> None:
        self.session.reset_sumaryinfo()

    def free_resource(self) -> None:
        self.session.free_resource()

    @staticmethod
    def finalize() -> None:
        aclruntime.InferenceSession.finalize()


def __getattr__(name: str) -> Any:
    if name == "InferSession":
        return Session2025 if aclruntime.generation() == 2025 else Session2023
    raise AttributeError(name)
