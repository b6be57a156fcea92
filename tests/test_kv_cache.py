"""Keys and values: where they lie, and that every copy of them comes back as it was."""

from __future__ import annotations

import pytest
import torch

from qwen_megakernel.decoding.kv_cache import swizzled


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("first", [0, 5, 16])
def test_rows_of_the_caches_are_swizzled_by_their_positions(head_dim, first):
    rows = torch.randn(3, 2, 21, head_dim)
    held = swizzled(rows, first)
    for n in range(21):
        turned = int(f"{(first + n) % 8:03b}"[::-1], 2)
        for word in range(head_dim // 8):
            at = word ^ turned
            assert torch.equal(
                held[:, :, n, 8 * at : 8 * at + 8], rows[:, :, n, 8 * word : 8 * word + 8]
            )
    assert torch.equal(swizzled(held, first), rows)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_the_kernel_reads_at_once_of_a_tile_lies_in_different_banks(head_dim):
    words = head_dim // 8
    dims = torch.arange(words).repeat_interleave(8).expand(16, -1).float()
    held = swizzled(dims, 0)[:, ::8].int()  # [position, place]: which word stands there
    place = torch.stack([held[n].argsort() for n in range(16)])  # [position, word]

    def banks(positions, taken):  # of 16 bytes; eight are all there are
        return {int(n * words + place[n, w]) % 8 for n in positions for w in taken}

    for half in (range(8), range(8, 16)):  # a matrix of the transposing loads: eight rows, one word
        assert all(len(banks(half, [w])) == 8 for w in range(words))
    for n in range(0, 16, 2):  # a quarter of a warp's key loads: two rows, four words
        assert all(len(banks((n, n + 1), range(b, b + 4))) == 8 for b in range(0, words, 4))
