"""Owns the device functions of the Triton sampler: keys that order logits, the search for a threshold, the walk.
Does not know where settings lie, or what a row asks for (triton.py)."""

import triton
import triton.language as tl

from servd_kernels import triton_support  # noqa: F401  sets Triton up before its first kernel

TILE = tl.constexpr(4096)  # logits a program looks at together: sums have this fixed split
FEW = tl.constexpr(2048)  # of the tokens that the filters could leave, so many together
BLOCK = tl.constexpr(64)  # logits in a block: its maximum tells how low the best so-and-so-many can lie


@triton.jit
def key_of(x):
    """uint32 that orders like x; zeros of both signs are equal."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def value_of(key):
    """The float32 that has this key."""
    bits = tl.where(key >> 31 != 0, key ^ 0x80000000, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def uniform(seed, position):
    """Philox-4x32-10 (Salmon et al. 2011): 53 bits of (seed, position) as a float64 in [0, 1)."""
    low = tl.full((), 0xFFFFFFFF, tl.uint64)
    seed, position = seed.to(tl.uint64), position.to(tl.uint64)
    k0, k1 = seed & low, seed >> 32
    c0, c1 = position & low, position >> 32
    c2, c3 = low & 0, low & 0
    for _ in tl.static_range(10):
        product0 = c0 * 0xD2511F53
        product1 = c2 * 0xCD9E8D57
        c0 = (product1 >> 32) ^ c1 ^ k0
        c1 = product1 & low
        c2 = (product0 >> 32) ^ c3 ^ k1
        c3 = product0 & low
        k0 = (k0 + 0x9E3779B9) & low
        k1 = (k1 + 0xBB67AE85) & low
    return (((c1 << 32) | c0) >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def lowest_of_best(block_max, num_blocks, count, BLOCKS: tl.constexpr):
    """A logit that at least `count` tokens reach: the count-th largest maximum of blocks; -inf for too few blocks."""
    column = tl.arange(0, BLOCKS)
    keys = key_of(tl.load(block_max + column, mask=column < num_blocks, other=float("-inf")))
    last = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        reached = tl.sum((keys >= (last | bit)).to(tl.int32))
        last = tl.where(reached >= count, last | bit, last)
        bit = bit >> 1
    return tl.where(count <= num_blocks, value_of(last), float("-inf"))


@triton.jit
def collect(x, vocab, lowest, block_max, values, ids):
    """Copies all tokens from `lowest` upwards, by rising id, to `values` and `ids`; returns how many."""
    count = tl.full((), 0, tl.int32)
    lane, block = tl.arange(0, FEW), tl.arange(0, FEW // BLOCK)
    for begin in range(0, vocab, FEW):
        if tl.max(tl.load(block_max + begin // BLOCK + block)) >= lowest:
            column = begin + lane
            value = tl.load(x + column, mask=column < vocab, other=float("-inf"))
            found = ((value >= lowest) & (column < vocab)).to(tl.int32)
            place = count + tl.cumsum(found, 0) - found
            tl.store(values + place, value, mask=found != 0)
            tl.store(ids + place, column, mask=found != 0)
            count += tl.sum(found)
    tl.debug_barrier()  # other threads of this program read them
    return count


@triton.jit
def _measures(values, column, count, highest, inverse_temperature, weighs):
    value = tl.load(values + column, mask=column < count, other=float("-inf"))
    measure = tl.where(weighs, tl.exp((value - highest) * inverse_temperature), tl.where(column < count, 1.0, 0.0))
    return key_of(value), measure


@triton.jit
def total_of(values, count, highest, inverse_temperature):
    """The sum of all weights, tile by tile. float32"""
    total = tl.full((), 0.0, tl.float32)
    for begin in range(0, count, FEW):
        key, measure = _measures(values, begin + tl.arange(0, FEW), count, highest, inverse_temperature, True)
        total += tl.sum(measure)
    return total


@triton.jit
def keep_best(values, count, wanted, highest, inverse_temperature, weighs):
    """Keeps the shortest run of best tokens whose measures (their number, or their weights) reach `wanted`.

    The others' values become -inf. The threshold's bits are found one by one: sums of a fixed order are monotone in
    it. Of the tokens at the threshold, as many as are needed stay, the lowest ids first.
    """
    last = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        reached = tl.full((), 0.0, tl.float32)
        for begin in range(0, count, FEW):
            key, measure = _measures(values, begin + tl.arange(0, FEW), count, highest, inverse_temperature, weighs)
            reached += tl.sum(tl.where(key >= (last | bit), measure, 0.0))
        last = tl.where(reached >= wanted, last | bit, last)
        bit = bit >> 1
    above = tl.full((), 0.0, tl.float32)
    for begin in range(0, count, FEW):
        key, measure = _measures(values, begin + tl.arange(0, FEW), count, highest, inverse_temperature, weighs)
        above += tl.sum(tl.where(key > last, measure, 0.0))
    each = tl.where(weighs, tl.exp((value_of(last) - highest) * inverse_temperature), 1.0)
    may_stay = tl.maximum(tl.ceil((wanted - above) / each), 1.0)
    before = tl.full((), 0.0, tl.float32)
    for begin in range(0, count, FEW):
        column = begin + tl.arange(0, FEW)
        key, measure = _measures(values, column, count, highest, inverse_temperature, False)
        equal = tl.where((key == last) & (column < count), 1.0, 0.0)
        rank = before + tl.cumsum(equal, 0) - equal
        goes = (key < last) | ((key == last) & (rank >= may_stay))
        tl.store(values + column, float("-inf"), mask=goes & (column < count))
        before += tl.sum(equal)
    tl.debug_barrier()


@triton.jit
def first_above(weight, column, running, target):
    """The column where the running sum of a tile first exceeds `target`; weights of 0 are never chosen."""
    sums = running + tl.cumsum(weight, 0).to(tl.float64)
    found = tl.min(tl.where((weight > 0) & (sums > target), column, 0x7FFFFFFF))
    # In this order of additions the sum may stay a little below the tile's.
    last = tl.max(tl.where(weight > 0, column, -1))
    return tl.minimum(found, last)


@triton.jit
def draw(values, count, highest, inverse_temperature, least, u):
    """The place of one token, drawn by the inverse of the running sum of weights, at u times its total."""
    lane = tl.arange(0, FEW)
    total = tl.full((), 0.0, tl.float64)
    for begin in range(0, count, FEW):
        key, weight = _measures(values, begin + lane, count, highest, inverse_temperature, True)
        total += tl.sum(tl.where(weight < least, 0.0, weight)).to(tl.float64)
    target = tl.minimum(u * total, total * (1.0 - 2.220446049250313e-16))  # strictly below the total
    running = tl.full((), 0.0, tl.float64)
    place = tl.full((), -1, tl.int32)
    for begin in range(0, count, FEW):
        column = begin + lane
        key, weight = _measures(values, column, count, highest, inverse_temperature, True)
        weight = tl.where(weight < least, 0.0, weight)
        mass = tl.sum(weight).to(tl.float64)
        if (place < 0) & (running + mass > target):
            place = first_above(weight, column, running, target)
        running += mass
    return place
