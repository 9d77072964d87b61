"""What decides the bytes of a result, and whether a source is still what it was.

A run that goes on with another's files, or says that an output is complete, must be sure that they
are of the same source. Names, sizes and headers are the same after any training, so the weights
have a say too, by a sample of their bytes (`checkpoint/samples.py`). That is all that a complete
output is recognized by: a copy of the source on another machine counts as the same.

What a sample might not show is one value of billions. To go on with an unfinished run in a
directory takes the same time of change and inode of every file too, so whatever was written there
in between is seen, at the price of starting over after a mere `touch`. A snapshot of the hub has
its commit for that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loftq_cli import __version__
from loftq_cli.checkpoint.index import Checkpoint, open_checkpoint
from loftq_cli.checkpoint.samples import samples
from loftq_cli.checkpoint.writer import hash_file
from loftq_cli.engines.settings import Settings
from loftq_cli.errors import CorruptCheckpoint
from loftq_cli.models.companions import Companion
from loftq_cli.models.source import CONFIG_FILE, read_config
from loftq_cli.models.spec import ResolvedModel


def fingerprint(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    settings: Settings,
    device: str,
    tokenizer: Sequence[Companion] = (),
) -> dict[str, Any]:
    """What decides the bytes of the result: two runs with the same one have the same result.

    ``tokenizer`` are the files that say which tokens a calibration text has.
    """
    files = {each.name: hash_file(each.path).sha256 for each in tokenizer}
    return {
        "loftq": __version__,
        "source": _weights(checkpoint),
        "config_sha256": digest(config),
        "settings": settings.as_dict(),
        **({"tokenizer_sha256": files} if files else {}),
        "device": device.partition(":")[0],
    }


def base_identity(fingerprint: Mapping[str, Any], settings: Settings) -> str:
    """What tells a quantized model, and the start beside it, from all others.

    It is the same in every container that holds the same codes and scales.
    """
    return digest({**fingerprint, "settings": settings.of_base()})


def digest(value: Mapping[str, Any]) -> str:
    """A fingerprint, or a config, as one word to be compared with that of another run."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def state(found: ResolvedModel, checkpoint: Checkpoint) -> dict[str, Any]:
    """What changes with anything that is written to the weights of a directory.

    Of a hub's snapshot: its commit. Files that are fetched again have another time and inode.
    """
    if found.identity.source == "hub":
        return {"revision": found.identity.revision}
    seen = {}
    for name, header in sorted(checkpoint.headers.items()):
        status = header.path.stat()
        seen[name] = {"mtime_ns": status.st_mtime_ns, "inode": status.st_ino}
    return {"files": seen}


def require_unchanged(
    found: ResolvedModel, checkpoint: Checkpoint, before: Mapping[str, Any]
) -> None:
    """Raises CorruptCheckpoint if the source is not what it was when its fingerprint was taken.

    What was read was seen to be unchanged when it was read; this is about the files as a whole. A
    commit of a hub stays what it is, and every answer of a stream was of that.
    """
    directory = found.directory
    changed = [] if found.streamed else _changed_files(directory, checkpoint, before)
    if digest(read_config(directory)) != before["config_sha256"]:
        changed.append(CONFIG_FILE)
    if changed:
        raise CorruptCheckpoint(
            f"{directory / changed[0]} changed while it was quantized",
            cause="a part of the output may be of the old file and another of the new one",
            hint="let no other program write there, and run the same line with --force",
        )


def _changed_files(directory: Path, checkpoint: Checkpoint, before: Mapping[str, Any]) -> list[str]:
    now = open_checkpoint(directory)
    weights = _weights(now)
    return [
        name
        for name in sorted({*weights, *checkpoint.headers})
        if weights.get(name) != before["source"].get(name)
        or now.headers[name].source != checkpoint.headers[name].source
    ]


def _weights(checkpoint: Checkpoint) -> dict[str, Any]:
    sampled = samples(checkpoint)
    return {
        name: {
            "bytes": header.file_bytes,
            "header_sha256": header.sha256,
            "sample_sha256": sampled[name],
        }
        for name, header in sorted(checkpoint.headers.items())
    }
