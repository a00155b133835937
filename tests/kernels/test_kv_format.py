"""Owns the tests of how keys and values lie in a block, and of what their codes keep.
Does not know any kernel: these are the plain torch functions that kernels are held to."""

import pytest
import torch
from servd_kernels.kv_format import CODES, KVFormat, decode, encode, hadamard

PAIRS = [("float32", "float32"), ("bfloat16", "int8"), ("int8", "int4"), ("int4", "int4"), ("fp8_e4m3", "float16")]
SHAPES = [(1, 8, 1), (3, 64, 16), (2, 80, 7), (2, 96, 8), (1, 128, 64), (1, 24, 3)]  # kv heads, head_dim, block size


def random_rows(head_dim: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(50, 3, head_dim, generator=torch.Generator().manual_seed(1))


def round_trip(x: torch.Tensor, name: str) -> torch.Tensor:
    codes, params = encode(x, CODES[name])
    return decode(codes, params, CODES[name])


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_int8_errs_by_half_a_step(head_dim: int, scale: float) -> None:
    x = random_rows(head_dim, scale)
    step = x.abs().amax(-1, keepdim=True) / 127
    # A scale in float16 is off by 2^-11 of itself (or by 2^-25), 127 steps out by 127 times that.
    bound = step / 2 + 127 * torch.maximum(step * 2**-11, torch.tensor(2.0**-25))
    assert ((round_trip(x, "int8") - x).abs() <= bound * 1.001).all()


@pytest.mark.parametrize("head_dim", [8, 64, 80])
def test_fp8_errs_by_a_sixteenth_of_the_number(head_dim: int) -> None:
    x = random_rows(head_dim)
    least_step = x.abs().amax(-1, keepdim=True) / 448 * 2**-9
    bound = torch.maximum(x.abs() * (2**-4 + 2**-10), least_step)
    assert ((round_trip(x, "fp8_e4m3") - x).abs() <= bound).all()


@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 128])
def test_int4_errs_less_than_steps_over_the_whole_range_would(head_dim: int) -> None:
    x = random_rows(head_dim)
    groups = torch.unflatten(x, -1, (-1, CODES["int4"].group_size(head_dim)))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = (high - low) / 15
    plain = ((groups - low) / step).round() * step + low
    error = torch.unflatten(round_trip(x, "int4"), -1, groups.shape[-2:]) - groups
    ours, theirs = (e.square().sum(-1) for e in (error, plain - groups))
    assert (ours <= theirs * 1.01).all()  # float16 scales may cost a little
    assert ours.sum() < 0.95 * theirs.sum()


def test_fp8_errs_less_than_with_the_largest_number_at_448() -> None:
    x = random_rows(64)
    scale = x.abs().amax(-1, keepdim=True) / 448
    plain = (x / scale).to(torch.float8_e4m3fn).float() * scale
    ours, theirs = ((y - x).square().sum(-1) for y in (round_trip(x, "fp8_e4m3"), plain))
    assert (ours <= theirs * 1.01).all() and ours.sum() < 0.9 * theirs.sum()


@pytest.mark.parametrize(("name", "dtype"), [(name, CODES[name].dtype) for name in ("float32", "bfloat16", "float16")])
def test_plain_codes_keep_their_dtype_exactly(name: str, dtype: torch.dtype) -> None:
    x = random_rows(64).to(dtype)
    assert torch.equal(round_trip(x, name).to(dtype), x)


@pytest.mark.parametrize("name", CODES)
def test_a_row_of_zeros_stays_zero(name: str) -> None:
    assert (round_trip(torch.zeros(2, 64), name) == 0).all()


@pytest.mark.parametrize("name", CODES)
def test_a_row_too_small_for_its_scale_becomes_zero_or_near(name: str) -> None:
    assert (round_trip(torch.full((1, 64), 1e-9), name).abs() <= 1.1e-9).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["fp8_e4m3", "int8", "int4"])
def test_a_group_with_nan_or_infinity_reads_back_as_nan(name: str, bad: float) -> None:
    x = random_rows(64)
    x[7, 1, 3] = bad
    out = round_trip(x, name)
    group = CODES[name].group_size(64)
    assert out[7, 1, :group].isnan().all()
    assert not out[7, 1, group:].isnan().any() and not out[6].isnan().any()


@pytest.mark.parametrize("width", [1, 8, 24, 64, 80, 96, 256])
def test_hadamard_is_its_own_inverse_and_keeps_dot_products(width: int) -> None:
    x, y = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(hadamard(hadamard(x)), x)
    torch.testing.assert_close((hadamard(x) * hadamard(y)).sum(-1), (x * y).sum(-1))


def test_hadamard_spreads_an_outlier() -> None:
    x = torch.zeros(64)
    x[5] = 8.0
    assert (hadamard(x).abs() == 1.0).all()


@pytest.mark.parametrize("key_words", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pair", PAIRS)
def test_every_byte_of_a_block_has_one_owner(
    pair: tuple[str, str], shape: tuple[int, int, int], key_words: bool
) -> None:
    kv_format = KVFormat(*pair, *shape, key_words)
    size, rows = shape[2], torch.zeros(3, kv_format.block_bytes, dtype=torch.uint8)
    views = [kv_format.codes(rows, side) for side in (kv_format.k, kv_format.v)]
    views += [kv_format.params(rows, side).view(torch.uint8) for side in (kv_format.k, kv_format.v)]
    for view in views:
        view += 1
    assert rows.max() == 1  # no byte in two of them
    used = size * sum(side.row_bytes + side.params_bytes for side in (kv_format.k, kv_format.v))
    assert int(rows[1].sum()) == shape[0] * used
    assert used <= kv_format.head_bytes < used + 4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pair", PAIRS)
def test_numbers_are_aligned_for_their_loads(pair: tuple[str, str], shape: tuple[int, int, int]) -> None:
    kv_format = KVFormat(*pair, *shape)
    assert kv_format.head_bytes % 4 == 0 and kv_format.block_bytes == shape[0] * kv_format.head_bytes
    for side in (kv_format.k, kv_format.v):
        assert side.row_bytes % 4 == 0 and side.data_offset % 4 == 0 and side.params_offset % 2 == 0


@pytest.mark.parametrize("name", CODES)
def test_words_are_the_rows_transposed(name: str) -> None:
    rows, words = (KVFormat(name, name, 2, 16, 4, key_words) for key_words in (False, True))
    x, slots = torch.randn(4, 2, 16), torch.arange(4)
    caches = [kv_format.allocate(1) for kv_format in (rows, words)]
    for kv_format, cache in zip((rows, words), caches, strict=True):
        kv_format.write(cache, kv_format.k, slots, x)
        kv_format.write(cache, kv_format.v, slots, x)
    for head in range(2):
        row, word = (cache[0, head * rows.head_bytes :][: 4 * rows.k.row_bytes] for cache in caches)
        assert torch.equal(word.view(-1, 4, 4).transpose(0, 1).flatten(), row)
        begin, end = head * rows.head_bytes + 4 * rows.k.row_bytes, (head + 1) * rows.head_bytes
        assert torch.equal(caches[0][0, begin:end], caches[1][0, begin:end])


@pytest.mark.parametrize("key_words", [False, True])
@pytest.mark.parametrize("name", CODES)
def test_a_token_writes_its_own_bytes_alone(name: str, key_words: bool) -> None:
    kv_format = KVFormat(name, name, 2, 24, 5, key_words)
    x = torch.randn(10, 2, 24, generator=torch.Generator().manual_seed(3))
    cache = torch.full((2, kv_format.block_bytes), 0xFF, dtype=torch.uint8)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(4))
    for side in (kv_format.k, kv_format.v):
        for slot in order.tolist():
            kv_format.write(cache, side, torch.tensor([slot]), x[slot : slot + 1])
        whole = torch.full_like(cache, 0xFF)
        kv_format.write(whole, side, torch.arange(10), x)
        assert torch.equal(kv_format.read(cache, side, order), kv_format.read(whole, side, order))


def test_bytes_of_a_token_are_those_that_capacity_is_reckoned_with() -> None:
    def per_token(key: str, value: str) -> float:
        return KVFormat(key, value, 1, 64, 16).block_bytes / 16

    assert [per_token(*pair) for pair in [("bfloat16",) * 2, ("int8",) * 2, ("int8", "int4"), ("int4",) * 2]] == [
        256, 132, 106, 80,
    ]  # fmt: skip


def test_wrong_formats_and_caches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"value is 'int3'; allowed: .*int4"):
        KVFormat("int8", "int3", 1, 64, 16)
    with pytest.raises(ValueError, match="head_dim is 12"):
        KVFormat("int8", "int8", 1, 12, 16)
    kv_format = KVFormat("int8", "int8", 1, 64, 16)
    with pytest.raises(ValueError, match=f"{kv_format.block_bytes}"):
        kv_format.check(torch.zeros(4, kv_format.block_bytes + 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="contiguous"):
        kv_format.check(torch.zeros(4, 2 * kv_format.block_bytes, dtype=torch.uint8)[:, ::2])


def test_the_null_block_is_zero() -> None:
    kv_format = KVFormat("int4", "int4", 2, 64, 16)
    assert (kv_format.allocate(3)[0] == 0).all()
