"""The CUDA max pool kernels on the emulator.

The source is the one nvcc compiles; threads and blocks take turns in a seeded random order, and
every access is checked against the tensors of the launch.
"""

from ctypes import CDLL, byref

import pytest
import torch
from emulator_build import COMPILER, HEADERS
from max_pool_cases import (
    DTYPES,
    LAYOUTS,
    SQUARE_POOLS,
    Pool,
    assert_same_bits,
    gradient_bound,
    in_buffer,
    random_input,
    reference_backward,
    reference_forward,
)
from max_pool_host import (
    BAD_ACCESS,
    INVALID_VALUE,
    SIZES,
    SUCCESS,
    backward_params,
    change,
    forward_params,
    load_library,
    regions_of,
    run_backward,
    run_forward,
)

pytestmark = [
    pytest.mark.skipif(HEADERS is None, reason="no CUDA headers (cuda_runtime_api.h, cuda_fp16.h)"),
    pytest.mark.skipif(COMPILER is None, reason="no host C++ compiler"),
]


@pytest.fixture(scope="session")
def library() -> CDLL:
    return load_library()


class Guarded:
    """A tensor in a buffer of canaries: a read outside shows in the result, a write in `check`."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "dense") -> None:
        self.view, self.buffer = in_buffer(shape, dtype, layout)

    @classmethod
    def of(cls, values: torch.Tensor, layout: str = "dense") -> "Guarded":
        guarded = cls(tuple(values.shape), values.dtype, layout)
        guarded.view.copy_(values)
        return guarded

    def check(self) -> None:
        rest = self.buffer.clone()
        rest.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).copy_(
            torch.full(self.view.shape, rest[0].item(), dtype=rest.dtype)
        )
        assert bool(rest.isnan().all() if rest.is_floating_point() else (rest == 0xEE).all())


def check(
    lib,
    x: torch.Tensor,
    pool: Pool,
    layout: str = "dense",
    out_layout: str = "dense",
    argmax_offset: int = 0,
) -> None:
    """Forward with and without argmax and backward with and without accumulate, against torch."""
    expected_y, expected_argmax = reference_forward(x, pool)
    shape = tuple(expected_y.shape)
    source = Guarded.of(x, layout)
    y, argmax = Guarded(shape, x.dtype, out_layout), Guarded(shape, torch.uint8)
    argmax.view = argmax.buffer[64 + argmax_offset :].as_strided(shape, argmax.view.stride())
    run_forward(lib, source.view, y.view, argmax.view, pool)
    assert_same_bits(y.view, expected_y)
    assert_same_bits(argmax.view, expected_argmax)
    inference = Guarded(shape, x.dtype, out_layout)
    run_forward(lib, source.view, inference.view, None, pool, seed=1)
    assert_same_bits(inference.view, expected_y)
    assert_same_bits(source.view, x)

    grad_y = Guarded.of(random_input(shape, x.dtype, 11, "normal"), out_layout)
    old = random_input(tuple(x.shape), x.dtype, 12, "normal")
    expected = reference_backward(x, grad_y.view, pool)
    for accumulate in (False, True):
        grad_x = Guarded.of(old, layout) if accumulate else Guarded(tuple(x.shape), x.dtype, layout)
        run_backward(lib, grad_y.view, argmax.view, grad_x.view, pool, accumulate)
        exact = expected + old.double() if accumulate else expected
        bound = gradient_bound(x, grad_y.view, old if accumulate else None, pool)
        error = (grad_x.view.double() - exact).abs()
        assert bool((error <= bound).all()), f"{error.max()} at {error.argmax()}"
        grad_x.check()
    for guarded in (source, y, argmax, inference, grad_y):
        guarded.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool", SQUARE_POOLS, ids=str)
def test_matches_torch(library, dtype, pool):
    check(library, random_input((2, 9, 7, 16), dtype, seed=0), pool)  # vectors
    check(library, random_input((2, 6, 8, 5), dtype, seed=1), pool)  # odd channels, even sizes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("out_layout", LAYOUTS)
def test_layouts(library, dtype, layout, out_layout):
    for kernel, stride, padding in ((3, 1, 1), (2, 2, 0)):
        pool = Pool.square(kernel, stride, padding, True)
        check(library, random_input((2, 5, 6, 24), dtype, 2), pool, layout, out_layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 4])
def test_misaligned_argmax(library, dtype, offset):
    """Aligned activations beside indices that are not: no vectors, unless 4 bytes are enough."""
    pool = Pool.square(3, 1, 1, False)
    check(library, random_input((2, 5, 6, 24), dtype, 2), pool, argmax_offset=offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", ["nan", "inf", "nan_inf", "all_minus_inf", "signed_zero"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [2, 3])
def test_special_values(library, dtype, values, stride, kernel):
    pool = Pool.square(kernel, stride, 1, True)
    for channels in (8, 3):
        check(library, random_input((2, 7, 8, channels), dtype, 3, values), pool)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_that_are_not_finite(library, dtype):
    """They reach the pixel that was the maximum and no other."""
    pool = Pool.square(3, 1, 1, False)
    x = random_input((1, 5, 5, 8), dtype, 4, "normal")
    grad_y = torch.ones_like(x)
    grad_y[0, 2, 2, 0], grad_y[0, 1, 1, 1], grad_y[0, 3, 3, 2] = torch.nan, torch.inf, -torch.inf
    argmax, grad_x = reference_forward(x, pool)[1], torch.empty_like(x)
    run_backward(library, grad_y, argmax, grad_x, pool)
    assert_same_bits(grad_x, reference_backward(x, grad_y, pool).to(dtype))


def test_random_configurations(library):
    """Windows that differ between height and width, sizes from 1, any layout."""
    generator = torch.Generator().manual_seed(5)

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    checked = 0
    for seed in range(250):
        kernel = (draw(2, 3), draw(2, 3))
        pool = Pool(kernel, (draw(1, 2), draw(1, 2)), (draw(0, 1), draw(0, 1)), draw(False, True))
        n, h, w, c = draw(1, 2, 3), draw(*range(1, 12)), draw(*range(1, 12)), draw(1, 4, 8, 17, 32)
        if h + 2 * pool.padding[0] < kernel[0] or w + 2 * pool.padding[1] < kernel[1]:
            continue  # torch: output size is too small
        x = random_input((n, h, w, c), draw(*DTYPES), seed, draw("ties", "normal", "nan_inf"))
        check(library, x, pool, draw(*LAYOUTS), draw(*LAYOUTS))
        checked += 1
    assert checked > 150


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [2, 3])
def test_threads_that_walk_several_rows(library, kernel, stride):
    """Enough outputs that a thread computes up to 8 (stride 1) of the 41 rows."""
    x = random_input((3, 41, 63, 149), torch.float32, 6)
    check(library, x, Pool.square(kernel, stride, 1, True))


@pytest.mark.parametrize("shape", [(70000, 2, 2, 1), (1, 140001, 1, 1)], ids=str)
def test_more_blocks_than_the_grid_has(library, shape):
    kernel = (2, min(2, shape[2]) + 1)
    pool = Pool(kernel, (2, 1), (0, 1), False)
    check(library, random_input(shape, torch.float32, 7), pool)


@pytest.mark.parametrize("channels", [16, 5])
def test_offsets_past_32_bits(library, channels):
    pool = Pool.square(3, 2, 1, True)
    values = random_input((2, 5, 4, channels), torch.float16, 8)
    expected_y, argmax = reference_forward(values, pool)
    step = 2**31 + 8  # elements from image to image; only the pages in use take memory
    far = torch.empty(step + 5 * 4 * channels, dtype=torch.float16)
    far = far.as_strided(values.shape, (step, 4 * channels, channels, 1))
    far.copy_(values)
    y = torch.empty_like(expected_y)
    run_forward(library, far, y, None, pool)
    assert_same_bits(y, expected_y)
    grad_y, near = random_input(tuple(y.shape), torch.float16, 9, "normal"), values.clone()
    run_backward(library, grad_y, argmax, near, pool, accumulate=True)
    run_backward(library, grad_y, argmax, far, pool, accumulate=True)
    assert_same_bits(far, near)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_thread_order_gives_the_same_bits(library, dtype):
    pool = Pool.square(3, 1, 1, False)
    x = random_input((2, 13, 9, 40), dtype, 10)
    grad_y = random_input((2, 13, 9, 40), dtype, 11, "normal")
    results = []
    for seed in range(4):
        y, argmax = torch.empty_like(x), torch.empty(x.shape, dtype=torch.uint8)
        grad_x = x.clone()
        run_forward(library, x, y, argmax, pool, seed)
        run_backward(library, grad_y, argmax, grad_x, pool, accumulate=True, seed=seed)
        results.append((y, argmax, grad_x))
    for result in results[1:]:
        for actual, first in zip(result, results[0], strict=True):
            assert_same_bits(actual, first)


def test_vectors_where_alignment_allows(library):
    """16-byte vectors: an eighth (float32: a quarter) of the threads of the scalar path."""
    pool, shape = Pool.square(3, 1, 1, False), (1, 3, 4, 256)
    for dtype, size in ((torch.float16, 8), (torch.bfloat16, 8), (torch.float32, 4)):
        for layout in LAYOUTS:
            x, y = Guarded.of(random_input(shape, dtype, 12), layout), Guarded(shape, dtype)
            argmax = Guarded(shape, torch.uint8)
            threads = 4 * 256 // (1 if layout in ("misaligned", "odd_rows") else size)
            run_forward(library, x.view, y.view, argmax.view, pool)
            assert library.grid_x() == threads // 128
            run_backward(library, y.view, argmax.view, x.view, pool)
            assert library.grid_x() == threads // 128


def tensors(shape=(1, 4, 4, 8), dtype=torch.float16):
    """x, y, argmax of a 3x3 stride 1 pool with padding 1."""
    return (
        torch.zeros(shape, dtype=dtype),
        torch.zeros(shape, dtype=dtype),
        torch.zeros(shape, dtype=torch.uint8),
    )


@pytest.mark.parametrize("changes", [{"batch": 0}, {"channels": 0}], ids=str)
def test_nothing_to_do_is_a_success_without_a_launch(library, changes):
    pool = Pool.square(3, 1, 1, False)
    x, y, argmax = tensors()
    forward = forward_params(x, y, argmax, pool)
    change(forward, x=None, y=None, argmax=None, **changes)
    assert library.forward(byref(forward), *regions_of(), 0) == SUCCESS
    assert library.launches() == 0
    backward = backward_params(y, argmax, x, pool)
    change(backward, grad_y=None, argmax=None, grad_x=None, **changes)
    assert library.backward(byref(backward), *regions_of(), 0) == SUCCESS
    assert library.launches() == 0


@pytest.mark.parametrize("empty", [{"output_h": 0}, {"output_w": 0}], ids=str)
def test_no_output_has_a_gradient_of_zero(library, empty):
    x, y, argmax = tensors()
    x.fill_(3)
    pool = Pool.square(3, 1, 1, False)
    params = backward_params(y, argmax, x, pool)
    change(params, grad_y=None, argmax=None, **empty)
    assert library.backward(byref(params), *regions_of(x), 0) == SUCCESS, library.last_error()
    assert not x.any()


INVALID = [
    *({"kernel_h": k} for k in (-1, 0, 1, 4, 2**31 - 1)),
    *({"kernel_w": k} for k in (0, 1, 4)),
    *({"stride_h": s} for s in (-1, 0, 3)),
    *({"stride_w": s} for s in (0, 3, 2**31 - 1)),
    *({"padding_h": p} for p in (-1, 2, 2**30)),
    *({"padding_w": p} for p in (-1, 2)),
    *({"dtype": d} for d in (-1, 3)),
    *({name: -1} for name in SIZES),
    *({name: 2**62} for name in SIZES if name != "batch"),
    {"output_h": 6},  # its last window lies below the input
    {"output_w": 6},
    {"input_h": 0},
    {"input_w": 0},
]


@pytest.mark.parametrize("changes", INVALID, ids=str)
def test_invalid_value(library, changes):
    pool = Pool.square(3, 1, 1, False)
    x, y, argmax = tensors()
    forward = forward_params(x, y, argmax, pool)
    change(forward, **changes)
    assert library.forward(byref(forward), *regions_of(x, y, argmax), 0) == INVALID_VALUE
    backward = backward_params(y, argmax, x, pool)
    change(backward, **changes)
    assert library.backward(byref(backward), *regions_of(x, y, argmax), 0) == INVALID_VALUE
    assert library.launches() == 0


def test_null_pointers(library):
    pool = Pool.square(3, 1, 1, False)
    x, y, argmax = tensors()
    for name in ("x", "y"):
        params = forward_params(x, y, argmax, pool)
        change(params, **{name: None})
        assert library.forward(byref(params), *regions_of(x, y, argmax), 0) == INVALID_VALUE
    for name in ("grad_y", "argmax", "grad_x"):
        params = backward_params(y, argmax, x, pool)
        change(params, **{name: None})
        assert library.backward(byref(params), *regions_of(x, y, argmax), 0) == INVALID_VALUE


@pytest.mark.parametrize("channels", [8, 3])
def test_the_address_check_reports_one_element_too_few(library, channels):
    """The check itself: each tensor in turn is declared one element shorter than it is."""
    pool = Pool.square(3, 1, 1, False)
    x, y, argmax = tensors((1, 4, 4, channels))
    for short in range(3):
        regions, count = regions_of(x, y, argmax)
        regions[short].end -= (x, y, argmax)[short].element_size()
        forward = forward_params(x, y, argmax, pool)
        assert library.forward(byref(forward), regions, count, 0) == BAD_ACCESS
        assert b"outside every tensor" in library.last_error()
        backward = backward_params(y, argmax, x, pool)
        assert library.backward(byref(backward), regions, count, 0) == BAD_ACCESS
