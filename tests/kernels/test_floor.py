"""Owns the tests of the machine's measured limits.
Does not know what the limits are here: timing never stands in a test."""

import math

import pytest
from servd_kernels import native
from servd_kernels.floor import Floor, measure


def test_the_floor_is_the_longer_of_memory_and_arithmetic() -> None:
    floor = Floor(read_gbps=50.0, copy_gbps=60.0, flops={"float32": 4e11, "bfloat16": 8e11})
    assert floor.seconds(50_000_000) == pytest.approx(1e-3)
    assert floor.seconds(50_000_000, 400_000_000) == pytest.approx(1e-3)
    assert floor.seconds(50_000_000, 800_000_000) == pytest.approx(2e-3)
    assert floor.seconds(50_000_000, 1_600_000_000, "bfloat16") == pytest.approx(2e-3)


def test_a_dtype_that_was_not_measured_is_refused() -> None:
    with pytest.raises(KeyError, match="int4"):
        Floor(1.0, 1.0, {"float32": 1.0}).seconds(1, 1, "int4")


@pytest.mark.skipif(native.library() is None, reason="no compiler")
@pytest.mark.parametrize("isa", native.isas())
def test_every_limit_is_measured_in_every_instruction_set(isa: str) -> None:
    before = native.isas()[0]
    native.select_isa(isa)
    try:
        floor = measure(seconds=0.001)
    finally:
        native.select_isa(before)
    assert floor.flops.keys() == {"float32", "float16", "bfloat16", "int8"}
    for limit in (floor.read_gbps, floor.copy_gbps, *floor.flops.values()):
        assert math.isfinite(limit) and limit > 0
