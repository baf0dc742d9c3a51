"""The nearest codeword of every row: the kernel that encoding and clustering spend their time in.

Knows points, codewords and one offset per codeword; nothing of levels, SIDs or files. A row's
result depends on that row alone: on the CPU a matrix product always sees tiles of one size, the
last one padded, so that no position in a batch can flip a near tie.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

TILE_ROWS = 256
"""Rows per product on the CPU. The scores of a tile should stay in the L2 cache: 256 x 2048 floats
take 2 MB. At width 64, 1024 rows were 10 to 100 % slower from 2048 codewords on."""
_WIDE, _WIDE_TILE_ROWS = 256, 1024
"""From this width on the product dominates, and packing codewords for it pays over more rows: 7 %
less time at 8192 x 512."""


def nearest_codes(
    points: torch.Tensor, codebook: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """Choose, for every point, the codeword k with the smallest -2 <x, c_k> + offset_k.

    Args:
        points: float32 [n, d].
        codebook: float32 [K, d].
        offsets: float32 [K]; |c_k|^2 makes the score a squared distance, up to |x|^2.

    Returns:
        int64 [n], the lowest such k.
    """
    if points.device.type != "cpu":
        return torch.addmm(offsets, points, codebook.T, alpha=-2.0).argmin(dim=1)
    height = _WIDE_TILE_ROWS if points.shape[1] >= _WIDE else TILE_ROWS
    codes = np.empty(len(points), dtype=np.int64)
    scores = torch.empty(height, len(codebook))
    # NumPy's argmin uses the vector unit; that of torch cost a third of the product at d = 64.
    view = scores.numpy()
    for start in range(0, len(points), height):
        tile = points[start : start + height]
        rows = len(tile)
        if rows < height:
            tile = torch.nn.functional.pad(tile, (0, 0, 0, height - rows))
        torch.addmm(offsets, tile, codebook.T, alpha=-2.0, out=scores)
        codes[start : start + rows] = view[:rows].argmin(axis=1)
    return torch.from_numpy(codes)


def rank_nearest(distances: npt.NDArray[np.float32], limit: int) -> npt.NDArray[np.int64]:
    """Rank the codewords of each row, nearest first and the lower index first among equals.

    Args:
        distances: float32 [n, K], finite.
        limit: codewords per row.

    Returns:
        int64 [n, min(limit, K)].
    """
    num_codes = distances.shape[1]
    width = min(limit, num_codes)
    # Adding zero makes -0.0 equal to 0.0; the flips make unsigned integers sort like the floats.
    bits = (distances + np.float32(0)).view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    # One integer of distance and index has no ties, so a partial sort has only one answer.
    keys = (ordered.astype(np.uint64) << np.uint64(32)) | np.arange(num_codes, dtype=np.uint64)
    if width < num_codes:
        keys = np.partition(keys, width - 1, axis=1)[:, :width]
    return (np.sort(keys, axis=1) & np.uint64(0xFFFFFFFF)).astype(np.int64)
