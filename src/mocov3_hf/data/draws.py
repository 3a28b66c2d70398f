"""Random numbers as a pure function of (seed, epoch, sample, stream): Philox4x32-10 on tensors.

A counter-based generator has no state. The numbers of a sample depend neither on the worker or process that draws
them nor on earlier draws. The generator is implemented here so that the numbers are identical on every device and do
not change when a library is upgraded during a run.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The tests use its published test
vectors.
"""

import math

import torch


_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Half of them are enough for long permutations. Those of five or six elements are then uniform to 0.04 %.
_FEISTEL_ROUNDS = 24

# Each purpose has its own stream. Views use their index (0, 1).
STREAM_SAMPLE_ORDER = 0x4F524401
STREAM_SHARD_ORDER = 0x4F524402
STREAM_WINDOW_ORDER = 0x4F524403
STREAM_SHARD_ROWS = 0x4F524404


def philox(counter: tuple, key: tuple) -> tuple[torch.Tensor, ...]:
    """Four 32-bit words for each counter.

    Args:
        counter: Four int64 tensors (broadcastable) of 32-bit words.
        key: Two 32-bit Python integers.

    Returns:
        Four int64 tensors with values in [0, 2**32).
    """
    x0, x1, x2, x3 = torch.broadcast_tensors(*counter)
    key0, key1 = key
    for _ in range(_ROUNDS):
        # The signed 64-bit product may overflow. Its bits are correct, and the mask removes the sign.
        product0 = x0 * _MULTIPLIERS[0]
        product1 = x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            ((product1 >> 32) & _MASK) ^ x1 ^ key0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ x3 ^ key1,
            product0 & _MASK,
        )
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return x0, x1, x2, x3


def random_words(seed: int, epoch: int, ids: torch.Tensor, stream: int, count: int) -> torch.Tensor:
    """`count` random 32-bit words for each id.

    Args:
        seed, epoch: Non-negative integers, of which 64 and 32 bits are used.
        ids: int64 (N,), sample ids or other counters.
        stream: Purpose of the numbers. Different streams are independent.
        count: Numbers per id.

    Returns:
        int64 (N, count), values in [0, 2**32).
    """
    blocks = (count + 3) // 4
    # The stream is part of the key, so that the block index can use all 32 bits of its counter.
    key = ((seed ^ stream) & _MASK, ((seed >> 32) ^ (stream * _WEYL[0])) & _MASK)
    block = torch.arange(blocks, dtype=torch.int64, device=ids.device)
    ids = ids.to(torch.int64)[:, None]
    epochs = torch.full((1, 1), epoch & _MASK, dtype=torch.int64, device=ids.device)
    words = philox((block[None, :], ids & _MASK, (ids >> 32) & _MASK, epochs), key)
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def uniforms(seed: int, epoch: int, ids: torch.Tensor, stream: int, count: int) -> torch.Tensor:
    """`count` uniform random numbers in the open interval (0, 1) for each id: float64 (N, count).

    Arguments as in `random_words`.
    """
    return (random_words(seed, epoch, ids, stream, count).to(torch.float64) + 0.5) * 2.0**-32


class Permutation:
    """A random permutation of range(length), evaluated where it is needed: exact integers, O(sqrt(length)) memory.

    A Feistel network on a table of rows and columns (position = row * columns + column): its rounds add, in turn, to
    the row a random number that depends on the column, and to the column one that depends on the row. Results in the
    few cells of the table beyond `length` are permuted again until they are not (cycle walking).

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains" (CT-RSA 2002).

    Args:
        seed, epoch, stream: As in `random_words`.
        length: Number of elements, up to 2**62.
        start: Offset of the counters. Parts of one stream that do not overlap have independent permutations.
    """

    def __init__(self, seed: int, epoch: int, length: int, stream: int, start: int = 0):
        self.length = length
        self.columns = math.isqrt(max(length - 1, 0)) + 1  # the square root, rounded up
        self.rows = max(1, -(-length // self.columns))
        ids = torch.arange(start, start + self.columns, dtype=torch.int64)
        words = random_words(seed, epoch, ids, stream, _FEISTEL_ROUNDS).T
        self._row_shifts = (words[0::2] % self.rows).contiguous()
        self._column_shifts = (words[1::2, : self.rows] % self.columns).contiguous()

    def __len__(self) -> int:
        return self.length

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """The elements at some positions: int64 (N,) in [0, length), of int64 (N,) in [0, length)."""
        elements = self._shuffled(positions)
        while len(beyond := (elements >= self.length).nonzero().flatten()):
            elements[beyond] = self._shuffled(elements[beyond])
        return elements

    def _shuffled(self, cells: torch.Tensor) -> torch.Tensor:
        row = torch.div(cells, self.columns, rounding_mode="floor")
        column = cells - row * self.columns
        for row_shifts, column_shifts in zip(self._row_shifts, self._column_shifts, strict=True):
            row = row + row_shifts[column]
            row -= (row >= self.rows) * self.rows
            column = column + column_shifts[row]
            column -= (column >= self.columns) * self.columns
        return row * self.columns + column


def permutation(seed: int, epoch: int, length: int, stream: int, start: int = 0) -> torch.Tensor:
    """All of a `Permutation`, with the same arguments: int64 (length,)."""
    return Permutation(seed, epoch, length, stream, start).at(torch.arange(length, dtype=torch.int64))
