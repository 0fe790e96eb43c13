"""Tables by which a kernel finds the nearest of 256 values in two steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CELLS = 1 << 16


@dataclass(frozen=True)
class CodeTable:
    """Values that codes stand for, and how the code of an fp32 number is found.

    values   (256,) fp32, in order
    cells    (65536,) uint8: the code of the lowest number among those with the same upper 16 bits
    borders  (256,) fp32: halfway from each value to the next; the last is infinite
    """

    values: torch.Tensor
    cells: torch.Tensor
    borders: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor) -> CodeTable:
        """Make the tables on the values' device. Raises ValueError where a cell holds more than one border."""
        assert values.shape == (256,) and values.dtype == torch.float32, "a code has 8 bits"
        borders = (values[:-1] + values[1:]) / 2
        lowest, highest = (torch.bucketize(ends, borders).clamp(max=255) for ends in _ends(values.device))
        if bool((highest - lowest > 1).any()):
            raise ValueError("two borders between codes differ in their lower 16 bits alone")
        return cls(values, lowest.to(torch.uint8), torch.cat((borders, borders.new_full((1,), torch.inf))))

    def on(self, device: torch.device) -> CodeTable:
        """Return a copy on a device."""
        return CodeTable(self.values.to(device), self.cells.to(device), self.borders.to(device))

    def nearest(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the codes (uint8) of fp32 numbers, as a kernel finds them: the oracle is `torch.bucketize`."""
        cells = (numbers.view(torch.int32) >> 16) & (CELLS - 1)
        codes = self.cells[cells]
        return codes + (numbers > self.borders[codes.int()]).to(torch.uint8)


def _ends(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lowest and the highest number of each cell. In cells of no numbers, 0."""
    upper = torch.arange(CELLS, device=device, dtype=torch.int32) << 16
    small, large = upper.view(torch.float32), (upper | 0xFFFF).view(torch.float32)
    negative = upper < 0
    ends = torch.where(negative, large, small), torch.where(negative, small, large)
    lowest, highest = (end.nan_to_num(0.0, posinf=torch.inf, neginf=-torch.inf) for end in ends)
    infinite = lowest.isinf() | highest.isinf()  # beside an infinity such a cell has only what is no number
    return torch.where(infinite, small, lowest), torch.where(infinite, small, highest)
