"""Features that a frozen encoder made, and whether it would make them again: what `gigamil features` stamps and training looks at."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from gigamil.config.schema import RunConfig
from gigamil.data.features import features_folder, features_path
from gigamil.data.h5 import Attribute, read_features, read_features_header
from gigamil.errors import CheckpointError, ConfigError, EnvironmentFault, ShardError
from gigamil.files import parse_object, replace_file
from gigamil.models.encoder import DenseEncoder, TileEncoder
from gigamil.models.slide_model import build_encoder_alone
from gigamil.train.checkpoint import CheckpointStore
from gigamil.train.cohort import TrainingData, pictured_shards

_log = logging.getLogger("gigamil")
Kind = Literal["float32", "float16"]
_ENCODER_PART = "encoder."
_MAX_LISTED = 20


class Taken(NamedTuple):
    """Tiles that were encoded, and the seconds of it; times the number of ranks."""

    tiles: float = 0.0
    seconds: float = 0.0
    rank_seconds: float = 0.0


def note_time(folder: Path, tiles: int, seconds: float, num_ranks: int) -> None:
    """Add to what making the features of a folder took, in `<folder>.spent.json`."""
    before = read_time(folder)
    now = Taken(before.tiles + tiles, before.seconds + seconds, before.rank_seconds + seconds * num_ranks)
    replace_file(_spent_file(folder), (json.dumps(now._asdict()) + "\n").encode())


def read_time(folder: Path) -> Taken:
    """What making the features of a folder took; nothing of features of others."""
    path = _spent_file(folder)
    if not path.is_file():
        return Taken()
    found = parse_object(
        path.read_text(encoding="utf-8"), f"'{path}'", "delete it: it only says how long features took"
    )
    return Taken(*(float(found.get(name, 0)) for name in Taken._fields))


def _spent_file(folder: Path) -> Path:
    there = folder.resolve()  # of a study's runs a link
    return there.with_name(f"{there.name}.spent.json")


def refuse_stale(config: RunConfig, data: TrainingData) -> None:
    """Refuse features by gigamil that the configured encoder would not make of the tiles there are now.

    Where the encoder's library or weights are not there any more, nothing can be compared, and the log says so. Features of others
    are taken as they are.

    Args:
        data: from `load_training_data`.
    Raises:
        ShardError: lists the slides.
    Cost: loads the encoder, and reads the header of each file.
    """
    folder = features_folder(config)
    try:
        encoder = encoder_of_features(config)
    except (ConfigError, EnvironmentFault, CheckpointError) as error:
        _log.warning("whether the features in '%s' are of the encoder as it is now was not checked: %s", folder, error)
        return
    wanted = encoder_attributes(config, encoder, kind_of_features(folder))["encoder_sha256"]
    slide_ids, shards = list(data.splits.split_of()), pictured_shards(config, data.shards)
    there = set(slide_ids) & set(shards.slide_ids) if shards else set()
    tiles_of = {slide_id: shards.manifest(slide_id).index.sha256 for slide_id in there} if shards else {}
    stale = []
    for slide_id in slide_ids:
        attributes = read_features_header(features_path(folder, slide_id)).attrs
        if "encoder_sha256" not in attributes:
            continue
        if attributes["encoder_sha256"] != wanted:
            stale.append(f"slide '{slide_id}': of another encoder, or of other weights, options or precision")
        elif slide_id in tiles_of and attributes.get("tiles_sha256") != tiles_of[slide_id]:
            stale.append(f"slide '{slide_id}': of other tiles than those of now")
    if stale:
        more = f"\n  and {len(stale) - _MAX_LISTED} more" if len(stale) > _MAX_LISTED else ""
        listed = "\n  ".join(stale[:_MAX_LISTED])
        raise ShardError(
            f"{len(stale)} of {len(slide_ids)} slides have stale features in '{folder}':\n  {listed}{more}\nRun `gigamil features` again; it "
            "encodes these slides only."
        )


def kind_of_features(folder: Path) -> Kind:
    """Kind of the numbers in the files of a folder; float32 where there are none."""
    for path in sorted(folder.glob("*.h5")):
        try:
            return "float16" if read_features(path, 0, 0).features_ND.dtype == np.float16 else "float32"
        except ShardError:  # damaged: it will be written anew
            continue
    return "float32"


def encoder_of_features(config: RunConfig) -> TileEncoder:
    """The encoder as training would start with it, in evaluation mode, on the CPU."""
    science = config.science
    encoder = build_encoder_alone(science)
    if science.warm_start is not None:
        found = CheckpointStore(science.warm_start / "checkpoints").load_parameters("best")
        part = {name.removeprefix(_ENCODER_PART): v for name, v in found.items() if name.startswith(_ENCODER_PART)}
        try:
            encoder.load_state_dict(part)
        except RuntimeError as error:
            raise ShardError(
                f"science.warm_start: the model in '{science.warm_start}' has another encoder than science.encoder: {error}"
            ) from error
    if isinstance(encoder, DenseEncoder):
        raise ConfigError(
            f"encoder '{science.encoder.name}' is dense: it looks beyond the borders of a tile, and `gigamil features` encodes "
            "tiles one by one. Set science.encoder.dense to null, take an encoder of tiles, or train end to end."
        )
    return encoder.eval().requires_grad_(False)


def encoder_attributes(config: RunConfig, encoder: TileEncoder, kind: Kind) -> dict[str, Attribute]:
    """What made the features: its name, and a digest of everything that decides them but the tiles."""
    part = config.science.encoder
    settings = {"name": part.name, "options": part.options, "precision": config.science.precision, "kind": kind}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, values in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {"encoder": part.name, "encoder_sha256": digest.hexdigest()}
