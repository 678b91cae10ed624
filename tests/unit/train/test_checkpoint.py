"""A checkpoint is the old generation or the new one, complete, whenever the process ends; damage is never loaded."""

import json
import os
from pathlib import Path

import pytest
import torch

from gigamil import files
from gigamil.errors import CheckpointError
from gigamil.files import replace_file
from gigamil.train import checkpoint
from gigamil.train.checkpoint import CheckpointStore
from gigamil.train.engine import TrainingState

FILES = ("parameters.safetensors", "moments.safetensors", "progress.json", "manifest.json")


def make_state(seed: int = 0) -> TrainingState:
    generator = torch.Generator().manual_seed(seed)
    weight, moment = torch.randn(2, 3, 4, generator=generator)
    return TrainingState({"w": weight, "b": torch.zeros(0)}, {"w/exp_avg": moment}, (seed, 7))


def commit(store: CheckpointStore, step: int, best: bool = False) -> Path:
    return store.commit(make_state(step), {"epoch": step * 10, "best_score": None}, step=step, best=best)


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def loaded_step(store: CheckpointStore, pointer: str = "latest") -> int:
    state, progress = store.load(pointer)
    wanted = make_state(progress["step"])
    assert all(torch.equal(state.parameters[key], wanted.parameters[key]) for key in wanted.parameters)
    assert torch.equal(state.moments["w/exp_avg"], wanted.moments["w/exp_avg"])
    assert state.optimizer_steps == wanted.optimizer_steps
    assert progress["epoch"] == progress["step"] * 10
    return progress["step"]


def test_what_is_committed_is_loaded(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert store.find() is None
    path = commit(store, 12)
    assert path == store.find()
    assert path.name == "000001-step-00000012"
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    assert loaded_step(store) == 12
    state, progress = store.load()
    assert state.parameters.keys() == {"w", "b"}
    assert progress["best_score"] is None
    assert store.load_parameters("latest")["w"].equal(state.parameters["w"])


def test_only_what_is_asked_for_is_read_and_all_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    path = commit(store, 12, best=True)
    read: list[str] = []
    load_file = checkpoint.load_file
    monkeypatch.setattr(checkpoint, "load_file", lambda file: read.append(file.name) or load_file(file))
    assert store.facts()["epoch"] == 120
    assert read == []
    assert store.load_parameters().keys() == {"w", "b"}
    assert read == ["parameters.safetensors"]
    (path / "moments.safetensors").write_bytes(b"")
    for function in (store.facts, store.load_parameters):
        with pytest.raises(CheckpointError, match=r"moments.safetensors' is damaged"):
            function()


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    a, b = (commit(CheckpointStore(tmp_path / name), 3) for name in "ab")
    assert [(a / file).read_bytes() for file in FILES] == [(b / file).read_bytes() for file in FILES]


def test_nothing_to_load_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no 'best' checkpoint in .*gigamil train"):
        CheckpointStore(tmp_path).load_parameters()


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    commit(store, 1, best=True)
    for step in (2, 3, 4, 5):
        commit(store, step)
    generations = ["000001-step-00000001", "000004-step-00000004", "000005-step-00000005"]
    assert names(store) == [*generations, "best", "latest"]
    assert (loaded_step(store), loaded_step(store, "best")) == (5, 1)
    commit(store, 6, best=True)
    assert names(store) == ["000005-step-00000005", "000006-step-00000006", "best", "latest"]
    assert loaded_step(store, "best") == 6


def test_the_best_can_be_named_afterwards(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    commit(store, 1)
    store.mark_best(store.find("latest"))
    commit(store, 2)
    assert (loaded_step(store, "best"), loaded_step(store)) == (1, 2)


@pytest.mark.parametrize("crash_at", range(18))
def test_a_crash_at_any_point_leaves_a_whole_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    store = CheckpointStore(tmp_path)
    commit(store, 1, best=True)
    commit(store, 2)
    calls = 0

    class Crash(BaseException):
        """A kill: nothing catches it."""

    def dying(function):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls > crash_at:
                raise Crash
            return function(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(files, "fsync", dying(files.fsync))
        patch.setattr(checkpoint, "save_file", dying(checkpoint.save_file))
        patch.setattr(files, "file_sha256", dying(files.file_sha256))
        patch.setattr(Path, "rename", dying(Path.rename))
        with pytest.raises(Crash):
            commit(store, 3, best=True)
    # 13 calls until `latest` is renamed, 3 more until `best` is.
    assert loaded_step(store) == (2 if crash_at <= 13 else 3)
    assert loaded_step(store, "best") == (1 if crash_at <= 16 else 3)
    assert calls == crash_at + 1
    resumed = loaded_step(store)
    commit(store, resumed + 1, best=True)
    assert loaded_step(store) == loaded_step(store, "best") == resumed + 1
    generations = [name for name in names(store) if name[0].isdigit()]
    assert generations == [f"{step:06d}-step-{step:08d}" for step in (resumed, resumed + 1)]
    assert names(store) == [*generations, "best", "latest"]


def test_leftovers_of_a_crash_are_collected(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    commit(store, 1)
    commit(store, 2)
    (tmp_path / "latest").write_text("000001-step-00000001\n")  # renamed, and killed before the pointer
    staging = tmp_path / ".staging-000009-step-00000099"
    staging.mkdir()
    (staging / "parameters.safetensors").write_bytes(b"half")
    assert loaded_step(store) == 1
    commit(store, 2)
    assert names(store) == ["000001-step-00000001", "000002-step-00000002", "latest"]
    assert loaded_step(store) == 2


@pytest.mark.parametrize("file", FILES)
def test_every_flipped_bit_is_found(tmp_path: Path, file: str) -> None:
    store = CheckpointStore(tmp_path)
    path = commit(store, 1) / file
    good = path.read_bytes()
    step = 1 if file == "manifest.json" else max(1, len(good) // 40)  # the manifest has no digest of its own
    for offset in {*range(0, len(good), step), len(good) - 1}:
        for bit in (0, 5, 7):
            bad = bytearray(good)
            bad[offset] ^= 1 << bit
            path.write_bytes(bad)
            with pytest.raises(CheckpointError, match="damaged|no readable manifest|has format"):
                store.load()
    path.write_bytes(good)
    assert loaded_step(store) == 1


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_short_or_missing_file_is_found(tmp_path: Path, file: str, damage: str) -> None:
    store = CheckpointStore(tmp_path)
    commit(store, 1)
    path = commit(store, 2) / file
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: -1 if damage == "cut" else 0])
    with pytest.raises(CheckpointError) as caught:
        store.load()
    assert "000001-step-00000001" in str(caught.value)  # what to continue from instead
    (tmp_path / "latest").write_text("000001-step-00000001\n")
    assert loaded_step(store) == 1


@pytest.mark.parametrize("text", [b"", b"000009-step-00000009\n", b"\xff\xfe\n", b"a\0b\n"])
def test_a_damaged_pointer_is_told(tmp_path: Path, text: bytes) -> None:
    store = CheckpointStore(tmp_path)
    commit(store, 1)
    (tmp_path / "latest").write_bytes(text)
    with pytest.raises(CheckpointError, match="has no readable manifest.*000001-step-00000001"):
        store.load()


def test_another_format_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = commit(store, 1) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(CheckpointError, match="has format 2; this gigamil reads 1"):
        store.load()


def test_a_full_disk_leaves_older_generations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    commit(store, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(CheckpointError, match="No space left on device.*Older checkpoints are untouched"):
            commit(store, 2)
    assert loaded_step(store) == 1
    commit(store, 2)
    assert loaded_step(store) == 2


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        commit(CheckpointStore(tmp_path / "file" / "checkpoints"), 1)


def test_a_file_is_replaced_in_one_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latest"
    replace_file(path, "old\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            replace_file(path, "new, and much longer\n")
    assert path.read_text() == "old\n"
    replace_file(path, "new\n")
    assert path.read_text() == "new\n"
    assert [file.name for file in tmp_path.iterdir()] == ["latest"]
