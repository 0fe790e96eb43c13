"""Attention of a model that generates: keys and values of earlier positions are kept, so that each token is computed once.

Shape legend: B rows, S new positions, T positions so far (the new ones among them), H query heads, K key/value heads (H is a
multiple of K), D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .documents import Documents


class CachedAttention:
    """Causal attention of new positions to all so far, in rows that are filled up on the left. Implements `Attend`.

    One serves one layer. All rows have equally many positions, of which the first are padding that nobody attends to.
    """

    def __init__(self, padding_B: torch.Tensor) -> None:
        """padding_B: positions of padding at the left of each row, int64."""
        self._padding_B = padding_B
        self._k_BTKD: torch.Tensor | None = None
        self._v_BTKD: torch.Tensor | None = None

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone, (rows,) int64."""
        self._padding_B = self._padding_B[rows]
        if self._k_BTKD is not None and self._v_BTKD is not None:
            self._k_BTKD, self._v_BTKD = self._k_BTKD[rows], self._v_BTKD[rows]

    def __call__(
        self,
        q_BSHD: torch.Tensor,
        k_BSKD: torch.Tensor,
        v_BSKD: torch.Tensor,
        documents: Documents | None = None,
        /,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Keep the new keys and values, and attend from the new positions. Returns (B, S, H, D). See `Attend`."""
        assert documents is None, "a generated text is one document"
        if self._k_BTKD is not None and self._v_BTKD is not None:
            k_BSKD, v_BSKD = torch.cat((self._k_BTKD, k_BSKD), 1), torch.cat((self._v_BTKD, v_BSKD), 1)
        self._k_BTKD, self._v_BTKD = k_BSKD, v_BSKD
        q_BHSD, k_BKTD, v_BKTD = (each.transpose(1, 2) for each in (q_BSHD, k_BSKD, v_BSKD))
        seen_B1ST = self._seen(q_BSHD.shape[1], k_BSKD.shape[1], window)
        if softcap is None and sinks is None:
            grouped = q_BHSD.shape[1] != k_BKTD.shape[1]
            out = F.scaled_dot_product_attention(q_BHSD, k_BKTD, v_BKTD, seen_B1ST, scale=scale, enable_gqa=grouped)
            return out.transpose(1, 2)
        shares = q_BHSD.shape[1] // k_BKTD.shape[1]
        k_BHTD, v_BHTD = k_BKTD.repeat_interleave(shares, 1), v_BKTD.repeat_interleave(shares, 1)
        scores = (q_BHSD @ k_BHTD.transpose(-1, -2)).float() * (q_BHSD.shape[-1] ** -0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen_B1ST, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
        weights = torch.softmax(scores, -1)[..., : k_BHTD.shape[2]]
        return (weights.to(v_BHTD.dtype) @ v_BHTD).transpose(1, 2)

    def _seen(self, new: int, so_far: int, window: int | None) -> torch.Tensor:
        """Return which positions each new one sees, (B, 1, S, T). Padding sees itself, lest its softmax be of nothing."""
        t_T = torch.arange(so_far, device=self._padding_B.device)
        s_S1 = t_T[so_far - new :, None]
        seen_ST = t_T <= s_S1
        if window is not None:
            seen_ST = seen_ST & (t_T > s_S1 - window)
        real_BT = t_T >= self._padding_B[:, None]
        return ((seen_ST & real_BT[:, None]) | (t_T == s_S1))[:, None]
