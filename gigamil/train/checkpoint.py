"""Checkpoints of gigamil's own: safetensors and JSON, committed by a rename, loadable at any rank count and ZeRO stage.

Order of a commit: staging folder, files, fsync, digests in a manifest, fsync, rename, pointer. A crash at any point
leaves the previous generation or the new one, complete; leftovers are collected by the next commit. Nothing is
pickled.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gigamil import files
from gigamil.errors import CheckpointError
from gigamil.train.average import AVERAGE
from gigamil.train.engine import TrainingState

FORMAT = 1
_STAGING = ".staging"
_PARAMETERS, _MOMENTS, _PROGRESS, _MANIFEST = (
    "parameters.safetensors",
    "moments.safetensors",
    "progress.json",
    "manifest.json",
)
_DIGESTED = (_PARAMETERS, _MOMENTS, _PROGRESS)


class CheckpointStore:
    """The `checkpoints/` folder of a run: one folder per generation, and the pointers `latest` and `best`.

    Args:
        folder: made when the first checkpoint is committed.
        keep: newest generations kept, beside the best.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self._keep = keep

    def commit(self, state: TrainingState, progress: Mapping[str, Any], *, step: int, best: bool = False) -> Path:
        """Write a generation and point `latest` (and `best`) to it. Called by one rank.

        Args:
            progress: JSON-able facts to continue from.
            step: optimiser step, part of the folder's name.
        Raises:
            CheckpointError: the disk is full or the folder cannot be written; older generations are untouched.
        """
        latest = self.find("latest")
        serial = 1 + (int(latest.name.split("-")[0]) if latest is not None else 0)
        final = self.folder / f"{serial:06d}-step-{step:08d}"
        staging = self.folder / f"{_STAGING}-{final.name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._collect_leftovers(latest)
            staging.mkdir()
            save_file(state.parameters, staging / _PARAMETERS)
            save_file(state.moments, staging / _MOMENTS)
            facts = {**progress, "step": step, "optimizer_steps": state.optimizer_steps}
            (staging / _PROGRESS).write_text(json.dumps(facts, indent=1))
            digests = {name: files.file_sha256(staging / name) for name in _DIGESTED}
            (staging / _MANIFEST).write_text(json.dumps({"format": FORMAT, "sha256": digests}, indent=1))
            for path in staging.iterdir():
                files.fsync(path)
            files.fsync(staging)
            staging.rename(final)
            files.fsync(self.folder)
            self._point("latest", final.name)
            if best:
                self._point("best", final.name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"checkpoint '{final}' could not be written: {error}. Older checkpoints are untouched; make room and "
                "run the same command again."
            ) from error
        self._drop_old()
        return final

    def mark_best(self, generation: Path) -> None:
        """Point `best` to a generation."""
        self._point("best", generation.name)

    def find(self, pointer: str = "latest") -> Path | None:
        """Folder of a generation by pointer; None if there is none yet."""
        file = self.folder / pointer
        return self.folder / file.read_text(errors="replace").strip() if file.is_file() else None

    def load(self, pointer: str = "latest") -> tuple[TrainingState, dict[str, Any]]:
        """`read` of the generation that a pointer names.

        Raises:
            CheckpointError: none there, or as `read`.
        """
        return self.read(self._found(pointer))

    def read(self, generation: Path) -> tuple[TrainingState, dict[str, Any]]:
        """State and facts of a generation, after comparing every file with its digest.

        Raises:
            CheckpointError: of another format, or damaged (names the file).
        """
        self._verify(generation)
        facts = _facts(generation)
        steps = tuple(facts["optimizer_steps"])
        return TrainingState(load_file(generation / _PARAMETERS), load_file(generation / _MOMENTS), steps), facts

    def load_parameters(self, pointer: str = "best") -> dict[str, Tensor]:
        """Parameters and buffers of a generation, averaged ones if there are (`science.optim.ema`); all its files are verified, as in
        `read`."""
        generation = self._found(pointer)
        self._verify(generation)
        with safe_open(generation / _MOMENTS, "pt") as moments:
            names = [name for name in moments.keys() if name.endswith(AVERAGE)]  # noqa: SIM118 - it is no dict
            averages = {name.removesuffix(AVERAGE): moments.get_tensor(name) for name in names}
        return load_file(generation / _PARAMETERS) | averages

    def facts(self, pointer: str = "best") -> dict[str, Any]:
        """What a generation records besides weights and moments; all its files are verified, as in `read`."""
        generation = self._found(pointer)
        self._verify(generation)
        return _facts(generation)

    def _found(self, pointer: str) -> Path:
        path = self.find(pointer)
        if path is None:
            raise CheckpointError(f"no '{pointer}' checkpoint in '{self.folder}'. Run `gigamil train` first.")
        return path

    def _verify(self, path: Path) -> None:
        try:
            manifest = json.loads((path / _MANIFEST).read_text())
            found_format, digests = manifest["format"], {name: manifest["sha256"][name] for name in _DIGESTED}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise CheckpointError(f"checkpoint '{path}' has no readable manifest: {error!r}. {self._cure()}") from error
        if found_format != FORMAT:
            raise CheckpointError(f"checkpoint '{path}' has format {found_format}; this gigamil reads {FORMAT}")
        for name, digest in digests.items():
            if not (path / name).is_file() or files.file_sha256(path / name) != digest:
                raise CheckpointError(f"checkpoint file '{path / name}' is damaged (sha256 differs). {self._cure()}")

    def _cure(self) -> str:
        others = [path.name for path in self._generations()]
        return (
            f"To continue from another generation, write its name into '{self.folder / 'latest'}'; here are: {others}"
        )

    def _collect_leftovers(self, latest: Path | None) -> None:
        # A generation newer than `latest` was renamed just before a crash, and nothing was built on it.
        newer = [path for path in self._generations() if latest is None or path.name > latest.name]
        for leftover in [*self.folder.glob(f"{_STAGING}-*"), *newer]:
            shutil.rmtree(leftover)

    def _drop_old(self) -> None:
        best = self.find("best")
        for path in self._generations()[: -self._keep]:
            if path != best:
                shutil.rmtree(path, ignore_errors=True)  # a file held open on a network disk must not end the run

    def _generations(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*-step-*"))

    def _point(self, pointer: str, name: str) -> None:
        files.replace_file(self.folder / pointer, name + "\n")


def _facts(generation: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((generation / _PROGRESS).read_text())
    return facts
