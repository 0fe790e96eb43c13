"""Reader of token shards: one virtual array of tokens and one of document ends over all files of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config.lazy import numpy as np
from ...config.per_host import is_first_on_host
from ..byte_progress import byte_progress, gigabytes
from .manifest import DOCUMENT_TYPE, TOKENIZER, FileEntry, ShardError, ShardManifest, digest_file

if TYPE_CHECKING:
    from numpy.typing import NDArray


def _check_size(folder: Path, entry: FileEntry) -> None:
    path = folder / entry.name
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise ShardError(
            f"{path}: missing, though {folder.name}/dataset.json lists it; copy or build the data set again"
        ) from None
    if found != entry.bytes:
        raise ShardError(f"{path}: {found} bytes, but {entry.bytes} were written; copy or build the data set again")


def _check_contents(folder: Path, entries: Sequence[FileEntry]) -> None:
    size = sum(entry.bytes for entry in entries)
    # Ranks that don't wait for a host's first one all read at once.
    with byte_progress(f"verifying {gigabytes(size)} in {folder}", size, quiet=not is_first_on_host()) as count:
        for entry in entries:
            path = folder / entry.name
            if digest_file(path, count) != entry.xxh3:
                raise ShardError(
                    f"{path}: damaged (its xxh3 digest differs from dataset.json); copy or build the data set again"
                )


def positions_of(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the positions in pieces [start, start + length), one behind the other."""
    within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(starts, lengths) + within


class TokenShards:
    """An opened shard folder.

    verify  read every file once and compare its digest (about 5 GB/s), with a bar; sizes are compared in any case

    Raises ShardError naming the file that is missing, truncated or damaged.
    """

    def __init__(self, folder: Path, verify: bool = False) -> None:
        self.folder = folder
        self.manifest = ShardManifest.read(folder)
        shards = self.manifest.shards
        entries = [entry for shard in shards for entry in (shard.tokens, shard.documents, shard.learned) if entry is not None]
        entries += [self.manifest.tokenizer] if self.manifest.tokenizer else []
        for entry in entries:
            _check_size(folder, entry)
        if verify:
            _check_contents(folder, entries)
        self.vocabulary = self.manifest.vocabulary
        self.fingerprint = self.manifest.fingerprint
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._tokens = [self._map(shard.tokens, dtype, shard.token_count) for shard in shards]
        self._ends = [self._map(shard.documents, np.dtype(DOCUMENT_TYPE), shard.document_count) for shard in shards]
        masks = [self._map(shard.learned, np.dtype(np.uint8), shard.token_count) for shard in shards if shard.learned]
        self._learned = masks if len(masks) == len(shards) else []
        self._starts = np.cumsum([0, *(shard.token_count for shard in shards)], dtype=np.int64)
        for shard, ends in zip(shards, self._ends, strict=True):
            if int(ends[-1]) != shard.token_count:
                raise ShardError(f"{folder / shard.documents.name}: damaged (the last document ends at {int(ends[-1])})")
        self.tokens = int(self._starts[-1])
        self.documents = sum(shard.document_count for shard in shards)

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer that made these tokens, if it is known."""
        return self.folder / TOKENIZER if self.manifest.tokenizer else None

    def _map(self, entry: FileEntry, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        path = self.folder / entry.name
        if entry.bytes != count * dtype.itemsize or not count:
            raise ShardError(f"{path}: {entry.bytes} bytes don't hold {count} numbers; build the data set again")
        # A plain array over the mapping: slicing np.memmap itself costs several times as much.
        return np.asarray(np.memmap(path, dtype=dtype, mode="r"))

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Read tokens [start, stop) of the whole data set into a new array.

        Raises ShardError naming the file if a token id lies outside the vocabulary.
        """
        if not 0 <= start < stop <= self.tokens:
            raise IndexError(f"tokens [{start}, {stop}) are not within [0, {self.tokens})")
        parts: list[NDArray[np.int64]] = []
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            first = int(self._starts[shard])
            end = min(stop, int(self._starts[shard + 1]))
            parts.append(self._checked(self._tokens[shard][start - first : end - first], shard))
            start, shard = end, shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @property
    def masked(self) -> bool:
        """True if some tokens carry no loss."""
        return bool(self._learned)

    def learned(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return whether the tokens at these positions of the whole data set carry loss as targets."""
        if not self._learned:
            return np.ones(len(positions), np.bool_)
        shards = np.searchsorted(self._starts, positions, side="right") - 1
        found = np.empty(len(positions), np.bool_)
        for shard in np.unique(shards):
            here = shards == shard
            found[here] = self._learned[shard][positions[here] - self._starts[shard]] != 0
        return found

    def read_pieces(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Read and concatenate pieces [start, start + length), none of which crosses shards. Raises as `read`."""
        positions = positions_of(starts, lengths)
        shards = np.searchsorted(self._starts, starts, side="right") - 1
        if (shards == shards[0]).all():
            shard = int(shards[0])
            return self._checked(self._tokens[shard][positions - self._starts[shard]], shard)
        found = np.empty(len(positions), np.int64)
        of_position = np.repeat(shards, lengths)
        for shard in np.unique(shards):
            here = of_position == shard
            found[here] = self._checked(self._tokens[shard][positions[here] - self._starts[shard]], int(shard))
        return found

    def _checked(self, stored: NDArray[Any], shard: int) -> NDArray[np.int64]:
        tokens = stored.astype(np.int64)
        highest = int(tokens.max())
        if highest >= self.vocabulary:
            raise ShardError(
                f"{self.folder / self.manifest.shards[shard].tokens.name}: token id {highest} is outside the vocabulary "
                f"of {self.vocabulary}; the file is damaged: copy or build the data set again"
            )
        return tokens

    def ends_within(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the ends of documents (the token behind their last one) that lie in (start, stop], in order."""
        parts: list[NDArray[np.int64]] = []
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while shard < len(self._ends) and int(self._starts[shard]) < stop:
            first = int(self._starts[shard])
            low, high = np.searchsorted(
                self._ends[shard], np.array([max(0, start - first), stop - first], DOCUMENT_TYPE), "right"
            )
            parts.append(self._ends[shard][low:high].astype(np.int64) + first)
            shard += 1
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def document_lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of every document, in order."""
        return np.concatenate([np.diff(ends.astype(np.int64), prepend=0) for ends in self._ends])
