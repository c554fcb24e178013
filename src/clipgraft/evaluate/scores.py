"""Dot products of two sets of vectors: in blocks with a known error, or pair by pair with reproducible bits.

`Products` multiplies blocks in bfloat16, float32 or float64 and says by how much a score may be off; `Exact`
scores chosen pairs in float64 in an order of additions that depends on nothing but the two vectors.

The bound. A row x is first rounded to the number type of the product, x' = x + d, and |d| is measured, not
estimated. Then x'·y' is off from x·y by at most |dx|·|y| + |x'|·|dy| (Cauchy-Schwarz), and the sum of D
products in *any* order by D·u / (1 - D·u) · |x'|·|y'| (Higham, *Accuracy and Stability of Numerical
Algorithms*, 2nd ed., eq. 3.5), where u is half an epsilon of the type that sums: float64's own, and float32's
for float32 and for bfloat16, which oneDNN and PyTorch's own kernels sum in float32. A block in bfloat16 is
rounded once more when it is stored. That needs no room in the bound: rounding keeps order, so whoever rounds
the threshold as well loses nothing.

int8, which processors multiply twice as fast as bfloat16, has no digits to spare for a few large columns, as
CLIP's features have. So columns are mixed first, in groups of a power of two, by a Hadamard matrix, whose
signs keep dot products: Hx·Hy = |group| · x·y. Sums of int8 products are whole numbers and therefore exact.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgraft.errors import TrainingError
from clipgraft.models.device import bf16_is_fast

_PLAIN = 4  # rows up to 2^4 long, or down to 2^-4, are used unscaled
_CACHE_BYTES = 2**20
_SPARE = 8  # more roundings than the few scalar ones of bounds and thresholds


@dataclass(frozen=True)
class Vectors:
    """One modality: rows as given (n, D), a power of two that brings the longest near 1, and norms.

    Attributes:
        norm: float64 (n,), of the scaled rows, in the order below.
        order: int64 (n,), the row that each number means; None where rows are numbered as given.
    """

    rows: Tensor
    scale: float
    norm: Tensor
    order: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, which: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Return scaled rows in another type; scaling by a power of two changes no digit."""
        if self.order is not None:
            which = self.order[which]
        rows = self.rows[which] if isinstance(which, slice) else self.rows.index_select(0, which)
        wide = rows if rows.dtype == torch.float64 else rows.to(torch.promote_types(dtype, torch.float32))
        return (wide if self.scale == 1 else wide * self.scale).to(dtype)

    def ordered(self, order: Tensor) -> Vectors:
        """Number rows that are numbered as given anew; they stay where they are."""
        return replace(self, norm=self.norm[order], order=order)


def measured(rows: Tensor, kind: str, block_bytes: int) -> Vectors:
    """Measure the norms of floating (n, D) rows.

    Raises:
        TrainingError: a row is not finite; comparisons with NaN are all false and would look like rank 1.
    """
    # Small results between large temporaries would keep the heap from giving these back: one tensor for all.
    norm = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for part in parts_of(len(rows), rows.shape[1], block_bytes):
        norm[part] = torch.linalg.vector_norm(rows[part].double(), dim=1)
    broken = (~norm.isfinite()).nonzero()
    if len(broken):
        raise TrainingError(
            f"{kind} features hold NaN or infinity in {len(broken)} of {len(rows)} rows (first: row "
            f"{int(broken[0])}): the model diverged or overflowed; lower the learning rate or use fp32/bf16."
        )
    exponent = math.frexp(float(norm.max()))[1]
    scale = 1.0 if abs(exponent) <= _PLAIN else 2.0 ** -max(-1000, min(1000, exponent))
    return Vectors(rows, scale, norm * scale)


class _Room(threading.local):
    """Memory for one block after another: to have it mapped anew costs as much as half of an int8 product.

    Each thread has its own.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=dtype, device=device)

    def of(self, rows: int, columns: int) -> Tensor:
        """Return uninitialised (rows, columns)."""
        if len(self._memory) < rows * columns:
            self._memory = self._memory.new_empty(rows * columns)
        return self._memory[: rows * columns].view(rows, columns)


class _LeftRows(threading.local):
    """The left rows as int8 that many blocks of a thread have in common."""

    of = slice(0)
    rows: Tensor | None = None


class Int8Products:
    """Blocks of scores left @ right.T as whole numbers, out of rows that are mixed and rounded to int8.

    Attributes:
        unit: what a block's numbers are to be multiplied by.
        left_slack, right_slack: as those of `Products`.
    """

    def __init__(self, left: Vectors, right: Vectors, block_bytes: int) -> None:
        self.dtype = torch.int8
        self._room = _Room(torch.int32, left.rows.device)
        self._left = left
        self._left_unit, right_unit = _int8_unit(left, block_bytes), _int8_unit(right, block_bytes)
        left_off = _int8_rounding(left, self._left_unit, block_bytes)
        # Filled in place: pieces that are joined at the end would take the same memory again.
        columns = right.rows.shape[1]
        self._right = right.rows.new_empty(len(right), columns + -columns % _WIDTH, dtype=torch.int8)
        right_off = _int8_rounding(right, right_unit, block_bytes, self._right)
        self._strip = _LeftRows()
        self.unit = self._left_unit * right_unit / _group(left.rows.shape[1])
        self.left_slack = _slack(left, left_off, right, right_off, torch.int8)
        self.right_slack = _slack(right, right_off, left, left_off, torch.int8)

    def block(self, left: slice, right: slice) -> Tensor:
        """Multiply some left with some right rows to int32 (a, b), which the next block overwrites."""
        strip = self._strip
        if strip.rows is None or strip.of != left:
            strip.of, strip.rows = left, _as_int8(_rounded(_mixed(self._left, left), self._left_unit))
        a, b = strip.rows, self._right[right]
        return torch._int_mm(a, b.T, out=self._room.of(len(a), len(b)))


class Products:
    """Blocks of scores left @ right.T in one floating number type.

    Attributes:
        unit: 1.
        left_slack: float64 (n,), a score of each left row is off by less than this, whatever the right row.
        right_slack: float64 (m,), the same of each right row.
    """

    def __init__(self, left: Vectors, right: Vectors, dtype: torch.dtype, block_bytes: int) -> None:
        self.dtype = dtype
        self._left, self._right = left, right
        left_off = _rounding(left, dtype, block_bytes)
        right_off = _rounding(right, dtype, block_bytes)
        self.left_slack = _slack(left, left_off, right, right_off, dtype)
        self.right_slack = _slack(right, right_off, left, left_off, dtype)

        self.unit = 1.0
        self._room = _Room(dtype, left.rows.device)
        self._block_bytes = block_bytes

    def block(self, left: slice, right: slice) -> Tensor:
        """Multiply some left with some right rows to (a, b) scores, which the next block overwrites."""
        a, b = self._left.take(left, self.dtype), self._right.take(right, self.dtype)
        return torch.mm(a, b.T, out=self._room.of(len(a), len(b)))

    def pairs(self, left_row: Tensor, right_row: Tensor) -> Tensor:
        """Compute (p,) scores of chosen pairs, in float32 or float64, off by no more than those of a block.

        Not in bfloat16, whose terms would be rounded one by one.
        """
        scores = torch.empty(len(left_row), dtype=self.dtype, device=left_row.device)
        for part in parts_of(len(left_row), self._left.rows.shape[1], self._block_bytes):
            terms = self._left.take(left_row[part], self.dtype)
            terms *= self._right.take(right_row[part], self.dtype)
            torch.sum(terms, 1, out=scores[part])
        return scores


def usable_types(device: torch.device) -> list[torch.dtype]:
    """List the number types worth a try, the fastest and coarsest first; float64 is always the last.

    int8 and bfloat16 only on processors: graphics cards may sum bfloat16 in bfloat16. int8 only where its
    sums are whole, and float32 where it is not secretly less, which several settings of PyTorch ask for.
    """
    types = [torch.bfloat16] if device.type == "cpu" and bf16_is_fast(device) else []
    if _float32_is_whole(device):
        types.append(torch.float32)
        if device.type == "cpu" and int8_is_fast():
            types.insert(0, torch.int8)
    return [*types, torch.float64]


class Exact:
    """Scores of chosen pairs, in float64: the same two vectors always give the same bits."""

    def __init__(self, left: Vectors, right: Vectors, block_bytes: int) -> None:
        self._left, self._right, self._block_bytes = left, right, block_bytes

    def pairs(self, left_row: Tensor, right_row: Tensor) -> Tensor:
        """Compute float64 (p,): left[left_row[k]] · right[right_row[k]]."""
        scores = torch.empty(len(left_row), dtype=torch.float64, device=left_row.device)
        for part in parts_of(len(left_row), self._left.rows.shape[1], self._block_bytes):
            terms = self._left.take(left_row[part], torch.float64)
            terms *= self._right.take(right_row[part], torch.float64)
            scores[part] = _fixed_sum(terms)
        return scores


def identities(vectors: Vectors, block_bytes: int) -> Tensor:
    """Give rows numbers, int64 (n,), that are one where rows are equal; a few equal rows may differ in it.

    Rows are sorted by a hash of their bits, and each is compared with the one before it.
    """
    rows = vectors.rows
    weights = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=torch.Generator().manual_seed(0))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    weights = weights.to(rows.device) | 1
    hashes = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    for part in parts_of(len(rows), rows.shape[1], block_bytes):
        hashes[part] = (rows[part].contiguous().view(bits).long() * weights).sum(1)
    order = hashes.argsort()
    new = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    for part in parts_of(len(rows) - 1, rows.shape[1], block_bytes):
        new[1:][part] = (rows[order[:-1][part]] != rows[order[1:][part]]).any(1)
    numbers = torch.empty_like(order)
    numbers[order] = new.cumsum(0)
    return numbers if vectors.order is None else numbers[vectors.order]


def parts_of(count: int, width: int, block_bytes: int) -> Iterator[slice]:
    """Yield slices of `count` rows of `width` columns that fit in `block_bytes` and a cache as float64."""
    step = max(1, min(block_bytes, _CACHE_BYTES) // (8 * width))
    return (slice(start, start + step) for start in range(0, count, step))


def _rounding(vectors: Vectors, dtype: torch.dtype, block_bytes: int) -> Tensor:
    """Return float64 (n,): the length of what each row loses when it is rounded to `dtype`."""
    if torch.promote_types(vectors.rows.dtype, dtype) == dtype:
        return torch.zeros_like(vectors.norm)
    lost = torch.empty_like(vectors.norm)
    for part in parts_of(len(vectors), vectors.rows.shape[1], block_bytes):
        whole = vectors.take(part, torch.float64)
        lost[part] = torch.linalg.vector_norm(whole - vectors.take(part, dtype).double(), dim=1)
    return lost


_LARGEST, _GROUP, _WIDTH = 127, 128, 64


def _group(columns: int) -> int:
    """How many neighbouring columns are mixed: the largest power of two that divides them, up to a bound."""
    return min(_GROUP, columns & -columns)


def _mixed(vectors: Vectors, part: slice) -> Tensor:
    """Mix the columns of some rows, float32 (n, D)."""
    rows = vectors.take(part, torch.float32)
    group = _group(rows.shape[1])
    return (rows.reshape(-1, group) @ _hadamard(group).to(rows.device)).view(rows.shape)


def _rounded(mixed: Tensor, unit: float) -> Tensor:
    """Round mixed rows, float32 (n, D), to float32 whole numbers that int8 holds."""
    return (mixed / unit).round_().clamp_(-_LARGEST, _LARGEST)


def _as_int8(rounded: Tensor) -> Tensor:
    """The same as int8 (n, D or more): products of a single column come out wrong in torch 2.14."""
    return F.pad(rounded.to(torch.int8), (0, -rounded.shape[1] % _WIDTH))


def _int8_unit(vectors: Vectors, block_bytes: int) -> float:
    """The unit of mixed rows as int8: the largest number is the largest that int8 holds."""
    parts = parts_of(len(vectors), vectors.rows.shape[1], block_bytes)
    return max(float(_mixed(vectors, part).abs().max()) for part in parts) / _LARGEST or 1.0


def _int8_rounding(vectors: Vectors, unit: float, block_bytes: int, into: Tensor | None = None) -> Tensor:
    """The length, float64 (n,), of what each row loses as int8; the rounded rows are kept in `into`."""
    group = _group(vectors.rows.shape[1])
    lost = torch.empty_like(vectors.norm)
    for part in parts_of(len(vectors), vectors.rows.shape[1], block_bytes):
        mixed = _mixed(vectors, part)
        rounded = _rounded(mixed, unit)
        lost[part] = torch.linalg.vector_norm(mixed.double() - unit * rounded.double(), dim=1)
        if into is not None:
            into[part] = _as_int8(rounded)
    # What float32 loses in mixing, and before, where rows are float64: see the bound above.
    units = (group + _SPARE) * torch.finfo(torch.float32).eps / 2
    return lost / math.sqrt(group) + math.sqrt(group) * units / (1 - units) * vectors.norm


@functools.cache
def _hadamard(size: int) -> Tensor:
    """The (size, size) matrix of signs whose rows are orthogonal, of a power of two."""
    signs = torch.ones(1, 1)
    while len(signs) < size:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    return signs


@functools.cache
def int8_is_fast() -> bool:
    """Whether this processor multiplies int8 matrices to whole sums, a third faster than any other kind.

    Older ones saturate sums of neighbouring products, others take far longer. The operator is not promised
    to stay as it is.
    """
    sides = []
    for value in (_LARGEST, -_LARGEST):
        matrix = torch.full((_PROBE, _PROBE), value, dtype=torch.int8)
        matrix[::3] = _LARGEST
        sides.append(matrix)
    try:
        for one in sides:
            for other in sides:
                wanted = one.double() @ other.double().T
                if not torch.equal(torch._int_mm(one, other.T).double(), wanted):
                    return False
    except (AttributeError, RuntimeError):
        return False
    wide = sides[0].to(torch.bfloat16 if bf16_is_fast(torch.device("cpu")) else torch.float32)
    # Threads that share a product wait for each other: that would time who else is at work on the machine.
    with alone():
        ours, theirs = _best_seconds(lambda: torch._int_mm(sides[0], sides[0].T), lambda: wide @ wide.T)
    return theirs > _WORTH_IT * ours


_PROBE, _REPEATS, _WORTH_IT = 512, 20, 1.3


@contextmanager
def alone() -> Iterator[None]:
    """Let operations of this thread use no other thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _best_seconds(*runs: Callable[[], object]) -> list[float]:
    """Time runs in turns, so that whoever else is at work on the machine disturbs all of them."""
    best = [math.inf for _ in runs]
    for _ in range(_REPEATS):
        for number, run in enumerate(runs):
            started = time.perf_counter()
            run()
            best[number] = min(best[number], time.perf_counter() - started)
    return best


def _slack(
    query: Vectors, query_off: Tensor, other: Vectors, other_off: Tensor, dtype: torch.dtype
) -> Tensor:
    columns = query.rows.shape[1]
    sums = torch.float64 if dtype in (torch.int8, torch.float64) else torch.float32
    # Whole numbers are summed exactly; a few roundings are left, of thresholds.
    units = (_SPARE if dtype == torch.int8 else columns + _SPARE) * torch.finfo(sums).eps / 2
    relative = units / (1 - units) if units < 0.5 else math.inf
    longest, worst = other.norm.max(), other_off.max()
    rounded = query.norm + query_off
    least = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny
    vanished = 4 * columns * 2**_PLAIN * least  # products too small for the type
    slack = query_off * longest + rounded * worst + relative * rounded * (longest + worst) + vanished
    widened: Tensor = slack * (1 + 1e-9)
    return widened


def _float32_is_whole(device: torch.device) -> bool:
    """Tell whether float32 products keep all 24 bits of their factors, unlike TF32 (11) or bfloat16 (8)."""
    probe, one = torch.zeros(2, 64, 64, device=device)
    probe[:, 0], one[:, 0] = 1 + 2.0**-11 + 2.0**-23, 1
    wanted = probe[0, 0]
    return bool((probe @ one.T == wanted).all() and (one @ probe.T == wanted).all())


def _fixed_sum(terms: Tensor) -> Tensor:
    """Sum (p, D) over D, in place, by folding halves: elementwise additions leave the order to nobody."""
    width = terms.shape[1]
    while width > 1:
        half = width // 2
        terms[:, :half] += terms[:, width - half : width]
        width -= half
    return terms[:, 0]
