"""Steps as older versions of Meshloom wrote them: format versions 1 to 3, made out of one that was saved today."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import load_manifest
from meshloom.checkpoint.reading.reader import Reader


def rewrite_as(step: Path, version: int, state: dict[str, Any] | None = None, **of_files: Any) -> None:
    """Rewrite a finished step in an older format, as its specification says: every box and every block in the manifest.

    state: instead of the step's own; of_files: what the manifest says of each file instead of the truth
    """
    files = open_files(step)
    manifest = load_manifest(files)
    reader = Reader(files, manifest)
    arrays = {
        key: {
            **{name: getattr(array, name) for name in ("name", "role", "dtype", "shape", "splits")},
            "boxes": [
                {"offsets": s.box.offsets, "shape": s.box.shape, "file": s.file, "range": (s.start, s.stop)}
                | ({"panels": s.panels} if s.panels > 1 else {})
                for s in reader.boxes(array)
            ],
        }
        for key, array in manifest.arrays.items()
    }
    leaf = 16384 if version == 1 else 4096
    listed: list[dict[str, Any]] = []
    for file in manifest.files:
        data = (step / file.name).read_bytes()
        leaves = b"".join(xxhash.xxh3_128_digest(data[at : at + leaf]) for at in range(0, len(data), leaf))
        span = 2**24 // leaf * 16
        blocks = [xxhash.xxh3_128_hexdigest(leaves[at : at + span]) for at in range(0, len(leaves), span)]
        listed.append({"name": file.name, "bytes": file.bytes, "leaves": file.leaves, "blocks": blocks, **of_files})
        if not of_files:
            (step / file.leaves).write_bytes(leaves)
    head: dict[str, Any] = {"format": "meshloom-checkpoint", "version": version, "step": manifest.step}
    head["world_size"] = manifest.world_size
    if version == 3:
        head |= {"run": None if manifest.run is None else manifest.run.as_dict(), "commit": manifest.commit}
    head |= {"hash": "xxh3-128", "leaf_bytes": leaf, "block_bytes": 2**24, "state": manifest.state if state is None else state}
    lines = [f"{json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(array)}" for key, array in arrays.items())
    body = "\n".join(["{", *lines, f'"files": {json.dumps(listed)},', f'"arrays": {{\n{rows}\n}},', ""]).encode()
    (step / "manifest.json").write_bytes(body + f'"digest": "{xxhash.xxh3_128_hexdigest(body)}"\n}}\n'.encode())
