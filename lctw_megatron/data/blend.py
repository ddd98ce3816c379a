"""The order of samples: sample number k of a run → (corpus, epoch, sequence).

A pure function of the weights, the numbers of sequences and the seed. It knows no ranks and keeps
no history, so any step can be looked up, on any number of ranks, without replaying the run.
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

LARGEST_PERIOD = 1 << 16
"""Samples after which the order of the corpora repeats, at most. Weights that need a longer period
to be exact are rounded to multiples of 1/LARGEST_PERIOD."""

_ROUNDS = 8


class Place(NamedTuple):
    """Where a sample comes from."""

    corpus: int
    epoch: int
    sequence: int


class SampleOrder:
    """Blends corpora of ``sizes`` sequences by ``weights``, each cycling through its own epochs.

    With ``shuffle`` each epoch of each corpus has its own permutation, drawn from ``seed``; without
    it, the sequences come in order every time.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool
    ) -> None:
        self._sizes = list(sizes)
        self._seed = seed
        self._shuffle = shuffle
        self._shares = whole_shares(weights)
        self._corpora = interleave(self._shares)
        # _earlier[p]: how often the corpus at position p came before p in this period.
        self._earlier = np.empty_like(self._corpora)
        for corpus, share in enumerate(self._shares):
            self._earlier[self._corpora == corpus] = np.arange(share)

    def __getitem__(self, sample: int) -> Place:
        period, position = divmod(sample, len(self._corpora))
        corpus = int(self._corpora[position])
        drawn = period * self._shares[corpus] + int(self._earlier[position])
        epoch, sequence = divmod(drawn, self._sizes[corpus])
        if self._shuffle:
            key = f"{self._seed}/{corpus}/{epoch}".encode()
            sequence = permute(sequence, self._sizes[corpus], key)
        return Place(corpus, epoch, sequence)


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Positive whole numbers in the proportions of the weights, as small as can be.

    The weights are read as the decimals they print as (0.1 is one tenth). If their exact shares
    add up to more than LARGEST_PERIOD they are rounded to shares of it, by largest remainders.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    unit = math.lcm(*(share.denominator for share in exact))
    shares = [int(share * unit) for share in exact]
    divisor = math.gcd(*shares)
    shares = [share // divisor for share in shares]
    total = sum(shares)
    if total <= LARGEST_PERIOD:
        return shares
    wanted = [Fraction(share * LARGEST_PERIOD, total) for share in shares]
    rounded = [max(1, math.floor(share)) for share in wanted]
    while (missing := LARGEST_PERIOD - sum(rounded)) != 0:
        step = 1 if missing > 0 else -1
        farthest = max(
            (i for i in range(len(shares)) if rounded[i] + step > 0),
            key=lambda i: step * (wanted[i] - rounded[i]),
        )
        rounded[farthest] += step
    return rounded


def interleave(shares: Sequence[int]) -> np.ndarray:
    """An order, int64 [sum of shares], in which corpus i occurs shares[i] times, evenly spread.

    After k samples corpus i of n has come up k·shares[i]/sum times, give or take 1 - 1/(2n - 2),
    for every k. Its turn j therefore has a first slot, (j + 1/(2n - 2))·sum/share rounded up, and a
    last one; taking the earliest deadline first meets all of them (Tijdeman 1980, "The chairman
    assignment problem"). Greedy error diffusion strays farther the more corpora there are.
    """
    total = sum(shares)
    turns = np.concatenate([np.arange(share) for share in shares])
    corpus = np.repeat(np.arange(len(shares)), shares)
    share = np.repeat(np.asarray(shares), shares)
    slack = max(2 * len(shares) - 2, 1)
    release = -(-(turns * slack + 1) * total // (slack * share)) - 1
    deadline = ((turns + 1) * slack - 1) * total // (slack * share)
    by_release = np.argsort(release, kind="stable")
    waiting: list[tuple[int, int]] = []
    order = np.empty(total, dtype=np.int64)
    released = iter(
        zip(*(a[by_release].tolist() for a in (release, deadline, corpus)), strict=True)
    )
    following = next(released, None)
    for slot in range(total):
        while following and following[0] <= slot:
            heapq.heappush(waiting, following[1:])
            following = next(released, None)
        order[slot] = heapq.heappop(waiting)[1]
    return order


def permute(position: int, size: int, key: bytes) -> int:
    """Where a seeded permutation of range(size) sends ``position``; O(1) memory.

    A Feistel network on pairs (left, right) of a grid of at least ``size`` cells: each round adds
    a keyed hash of one half to the other, which can be undone, so it is a bijection of the grid;
    values outside range(size) are sent round again until they fall inside, which keeps it a
    bijection (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    secret = blake2b(key, digest_size=32).digest()

    def scramble(half: int, turn: int) -> int:
        digest = blake2b(half.to_bytes(8, "little"), key=secret, salt=bytes([turn]), digest_size=8)
        return int.from_bytes(digest.digest(), "little")

    while True:
        left, right = divmod(position, columns)
        for turn in range(0, _ROUNDS, 2):
            left = (left + scramble(right, turn)) % rows
            right = (right + scramble(left, turn + 1)) % columns
        position = left * columns + right
        if position < size:
            return position
