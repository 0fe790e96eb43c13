"""Read a Meshloom checkpoint with `numpy` and `safetensors` alone: a second reader of docs/checkpoint.md, formats 1 to 5.

    python read_checkpoint.py step-00000200                       # what is in it
    python read_checkpoint.py step-00000200 weight/norm.weight    # one array, put together from its boxes
    from read_checkpoint import Checkpoint; Checkpoint("step-00000200")["weight/norm.weight"]

It checks that the manifest is complete, that files are there with their lengths, and that the safetensors headers say what the
manifest says. From format 4 on the headers alone list the boxes; it checks that these are as large as the arrays. It does not
check digests (that takes `xxhash`): `meshloom checkpoint verify` does.
"""

# pyright: basic

import json
import math
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
        version = self.manifest["version"]
        if self.manifest["format"] != "meshloom-checkpoint" or version > 5:
            raise ValueError(f"{self.folder}: not a meshloom-checkpoint of version 1 to 5")
        self.step, self.state, self.arrays = (self.manifest[key] for key in ("step", "state", "arrays"))
        if version < 4:
            self.files = [(file["name"], 0, file["bytes"]) for file in self.manifest["files"]]
        elif version == 4:
            suffix = f"{self.manifest['suffix']}.safetensors"
            self.files = [(f"rank-{rank:05d}{suffix}", 0, size) for rank, size, *_ in self.manifest["files"]]
        else:
            self.files = [(f"host-{host:05d}.segments", at, size) for _, size, _, _, host, at in self.manifest["files"]]
        ends = {}  # of each file: of a host's segments the last one's counts
        for name, start, size in self.files:
            if start != ends.get(name, 0):
                raise ValueError(f"{name}: its segment at byte {start} does not begin where the one before it ends")
            ends[name] = self._end(start, size)
        for number, (name, _, _) in enumerate(self.files):
            if (self.folder / name).stat().st_size != ends[name]:
                raise ValueError(f"{name}: wrong length")
            found = list(self._boxes(number))
            if version >= 4:
                for key, box in found:
                    self.arrays[key].setdefault("boxes", []).append(box)
            elif found != self._listed(number):
                raise ValueError(f"{name}: its header and the manifest disagree")
        for key, array in self.arrays.items():
            if sum(math.prod(box["shape"]) for box in array["boxes"]) != math.prod(array["shape"]):
                raise ValueError(f"{key}: its boxes do not make it up")

    def _end(self, start, size):
        """The end of a file, or of a segment: behind its digests, and zeros up to the next page."""
        if self.manifest["version"] < 5:
            return size
        leaf, block = self.manifest["leaf_bytes"], self.manifest["block_bytes"]
        return math.ceil((start + size + 16 * (math.ceil(size / leaf) + math.ceil(size / block))) / leaf) * leaf

    def _boxes(self, number):
        """The boxes that a file's header lists, in the file's order."""
        path, first = self.folder / self.files[number][0], self.files[number][1]
        with path.open("rb") as file:
            file.seek(first)
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        if self.manifest["version"] < 5:
            with safe_open(path, "np") as file:  # which checks the header, of whole files only
                if set(file.keys()) != set(header):
                    raise ValueError(f"{path.name}: its header can't be read")
        for name, entry in sorted(header.items(), key=lambda each: each[1]["data_offsets"]):
            key, _, at = name.rpartition("@")
            shape, offsets = entry["shape"], [int(each) for each in at.split(",") if each]
            box = {"offsets": offsets, "shape": shape, "file": number}
            box["range"] = [first + 8 + length + each for each in entry["data_offsets"]]
            if len(shape) > len(offsets):
                box |= {"panels": shape[0], "shape": [*shape[1:-1], shape[0] * shape[-1]]}
            if entry["dtype"] != self.arrays[key]["dtype"]:
                raise ValueError(f"{name}: its header and the manifest disagree")
            yield key, box

    def _listed(self, number):
        """The same as a manifest up to format 3 lists them."""
        listed = [(key, box) for key, array in self.arrays.items() for box in array["boxes"] if box["file"] == number]
        return sorted(listed, key=lambda each: each[1]["range"])

    def __getitem__(self, key):
        """One array, whole."""
        array = self.arrays[key]
        whole = np.empty(array["shape"], DTYPES[array["dtype"]])
        for box in array["boxes"]:
            path = self.folder / self.files[box["file"]][0]
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
