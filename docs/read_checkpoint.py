"""Read a Meshloom checkpoint with `numpy` and `safetensors` alone: a second reader of docs/checkpoint.md, formats 1 to 3.

    python read_checkpoint.py step-00000200                       # what is in it
    python read_checkpoint.py step-00000200 weight/norm.weight    # one array, put together from its boxes
    from read_checkpoint import Checkpoint; Checkpoint("step-00000200")["weight/norm.weight"]

It checks that the manifest is complete, that files are there with their lengths, and that the safetensors headers say what
the manifest says. It does not check digests (that takes `xxhash`): `meshloom checkpoint verify` does.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "C64": "<c8"}
DTYPES |= {"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1"}


def stored_shape(box):
    """A box is stored row-major or, with `panels`, as so many equal shares of its columns, one after the other."""
    panels, shape = box.get("panels"), box["shape"]
    return [panels, *shape[:-1], shape[-1] // panels] if panels else shape


class Checkpoint:
    """Arrays by key `<role>/<name>`. BF16 is widened to float32, exactly; float8 comes as the bytes it is."""

    def __init__(self, folder):
        self.folder = Path(folder)
        text = (self.folder / "manifest.json").read_text()
        if not text.endswith('"\n}\n') or '\n"digest": "' not in text:
            raise ValueError(f"{self.folder}: the manifest is cut off")
        self.manifest = json.loads(text)
        if self.manifest["format"] != "meshloom-checkpoint" or self.manifest["version"] > 3:
            raise ValueError(f"{self.folder}: not a meshloom-checkpoint of version 1, 2 or 3")
        self.step, self.state, self.arrays = (self.manifest[key] for key in ("step", "state", "arrays"))
        for file in self.manifest["files"]:
            if (self.folder / file["name"]).stat().st_size != file["bytes"]:
                raise ValueError(f"{file['name']}: wrong length")
            self._check_header(file["name"])

    def _check_header(self, name):
        """Check that the safetensors library sees in a file what the manifest says of it."""
        number = [file["name"] for file in self.manifest["files"]].index(name)
        boxes = {
            f"{key}@{','.join(map(str, box['offsets']))}": (array["dtype"], stored_shape(box))
            for key, array in self.arrays.items()
            for box in array["boxes"]
            if box["file"] == number
        }
        with safe_open(self.folder / name, "np") as file:
            parts = {key: file.get_slice(key) for key in list(file.keys())}
            found = {key: (part.get_dtype(), part.get_shape()) for key, part in parts.items()}
        if found != boxes:
            raise ValueError(f"{name}: its header and the manifest disagree")

    def __getitem__(self, key):
        """One array, whole."""
        array = self.arrays[key]
        whole = np.empty(array["shape"], DTYPES[array["dtype"]])
        for box in array["boxes"]:
            path = self.folder / self.manifest["files"][box["file"]]["name"]
            count = (box["range"][1] - box["range"][0]) // whole.itemsize
            values = np.fromfile(path, whole.dtype, count, offset=box["range"][0])
            where = tuple(slice(start, start + extent) for start, extent in zip(box["offsets"], box["shape"], strict=True))
            values = values.reshape(stored_shape(box))
            whole[(*where, ...)] = np.concatenate(list(values), -1) if "panels" in box else values
        if array["dtype"] == "BF16":
            return (whole.astype("<u4") << 16).view("<f4")
        return whole


def main():
    """Print a list of the arrays, or one of them."""
    checkpoint = Checkpoint(sys.argv[1])
    if len(sys.argv) > 2:
        print(checkpoint[sys.argv[2]])
        return
    run = (checkpoint.manifest.get("run") or {}).get("id", "no run that it names")
    print(f"step {checkpoint.step} of {run}, from {checkpoint.manifest['world_size']} ranks; state: {sorted(checkpoint.state)}")
    for key, array in checkpoint.arrays.items():
        print(f"{key}  {array['dtype']}{array['shape']}  {len(array['boxes'])} boxes")


if __name__ == "__main__":
    main()
