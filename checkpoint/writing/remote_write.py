"""Writing a rank's file to an object store through fsspec. No torch: the writer process uses it."""

from __future__ import annotations

import time

from ..digest import BLOCK_BYTES, leaf_digests, seal
from ..faults import reach
from .image import Ready, Written


def write_image_remote(image: memoryview, folder: str, name: str, leaves: str, ready: Ready) -> Written:
    """Upload `image` and its leaves' digests; each block is hashed just before it is sent."""
    import fsspec  # only where it is used: importing it costs a tenth of a second

    system, path = fsspec.core.url_to_fs(folder)
    start = time.perf_counter()
    hashing = 0.0
    digests: list[bytes] = []
    reach("data.put.before")
    with system.open(f"{path}/{name}", "wb") as file:
        for at in range(0, len(image), BLOCK_BYTES):
            block = image[at : at + BLOCK_BYTES]
            ready(at + len(block))
            before = time.perf_counter()
            digests.append(leaf_digests(block))
            hashing += time.perf_counter() - before
            reach("data.put", len(block))
            file.write(block)
    reach("data.put.after")
    beside, sealed = seal(b"".join(digests))
    system.pipe_file(f"{path}/{leaves}", beside)
    reach("leaves.put.after")
    return Written(len(image), sealed, hashing, time.perf_counter() - start, False)
