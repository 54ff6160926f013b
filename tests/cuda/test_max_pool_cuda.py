"""The max pool ops on a GPU; tests/test_max_pool_cuda_host.py runs the same kernels on the CPU."""

import pytest
import torch
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

import inception_ext  # noqa: F401  (registers the ops)

# Pools 1 to 4 of GoogLeNet and the one of an Inception module: H, W, C, pool.
GOOGLENET = [
    (112, 112, 64, Pool.square(3, 2, 0, True)),
    (56, 56, 192, Pool.square(3, 2, 0, True)),
    (28, 28, 480, Pool.square(3, 2, 0, True)),
    (14, 14, 832, Pool.square(2, 2, 0, True)),
    (28, 28, 256, Pool.square(3, 1, 1, True)),
]


def on_gpu(values: torch.Tensor, layout: str = "dense") -> torch.Tensor:
    """values [N, H, W, C] as [N, C, H, W] on the GPU, in a buffer that is NaN elsewhere."""
    view, _ = in_buffer(tuple(values.shape), values.dtype, layout, "cuda")
    view.copy_(values)
    return view.permute(0, 3, 1, 2)


def forward(x: torch.Tensor, pool: Pool, with_argmax: bool = True):
    return torch.ops.inception_ext.max_pool_forward(
        x, pool.kernel, pool.stride, pool.padding, pool.ceil_mode, with_argmax
    )


def backward(grad_y: torch.Tensor, argmax: torch.Tensor, size: torch.Size, pool: Pool):
    return torch.ops.inception_ext.max_pool_backward(
        grad_y, argmax, size[-2:], pool.kernel, pool.stride, pool.padding
    )


def to_nhwc(t: torch.Tensor) -> torch.Tensor:
    return t.cpu().permute(0, 2, 3, 1).contiguous()


def check(x: torch.Tensor, pool: Pool, layout: str = "dense", out_layout: str = "dense") -> None:
    """Forward with and without argmax, and backward, of x [N, H, W, C], against torch."""
    expected_y, expected_argmax = reference_forward(x, pool)
    source = on_gpu(x, layout)
    y, argmax = forward(source, pool)
    assert_same_bits(to_nhwc(y), expected_y)
    assert_same_bits(to_nhwc(argmax), expected_argmax)
    assert_same_bits(to_nhwc(forward(source, pool, with_argmax=False)[0]), expected_y)

    grad_y = random_input(tuple(expected_y.shape), x.dtype, 11, "normal")
    grad_x = backward(on_gpu(grad_y, out_layout), argmax, source.shape, pool)
    error = (to_nhwc(grad_x).double() - reference_backward(x, grad_y, pool)).abs()
    assert bool((error <= gradient_bound(x, grad_y, None, pool)).all()), error.max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool", SQUARE_POOLS, ids=str)
def test_matches_torch(dtype, pool):
    check(random_input((2, 9, 7, 16), dtype, seed=0), pool)  # vectors
    check(random_input((2, 6, 8, 5), dtype, seed=1), pool)  # odd channels, even sizes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("out_layout", LAYOUTS)
def test_layouts(dtype, layout, out_layout):
    for kernel, stride, padding in ((3, 1, 1), (2, 2, 0)):
        pool = Pool.square(kernel, stride, padding, True)
        check(random_input((2, 5, 6, 24), dtype, 2), pool, layout, out_layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", ["nan", "inf", "nan_inf", "all_minus_inf", "signed_zero"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [2, 3])
def test_special_values(dtype, values, stride, kernel):
    for channels in (8, 3):
        x = random_input((2, 7, 8, channels), dtype, 3, values)
        check(x, Pool.square(kernel, stride, 1, True))


def test_random_configurations():
    """Windows that differ between height and width, sizes from 1, any layout."""
    generator = torch.Generator().manual_seed(5)

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    for seed in range(250):
        kernel = (draw(2, 3), draw(2, 3))
        pool = Pool(kernel, (draw(1, 2), draw(1, 2)), (draw(0, 1), draw(0, 1)), draw(False, True))
        n, h, w, c = draw(1, 2, 3), draw(*range(1, 12)), draw(*range(1, 12)), draw(1, 4, 8, 17, 32)
        if h + 2 * pool.padding[0] < kernel[0] or w + 2 * pool.padding[1] < kernel[1]:
            continue  # torch: output size is too small
        x = random_input((n, h, w, c), draw(*DTYPES), seed, draw("ties", "normal", "nan_inf"))
        check(x, pool, draw(*LAYOUTS), draw(*LAYOUTS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("h, w, c, pool", GOOGLENET, ids=str)
def test_googlenet_shapes(dtype, h, w, c, pool):
    check(random_input((8, h, w, c), dtype, 6), pool)  # threads walk several rows


def test_batch_larger_than_the_grid():
    check(random_input((70000, 2, 2, 1), torch.float32, 7), Pool.square(2, 2, 0, False))


@pytest.mark.parametrize("shape", [(0, 8, 8, 16), (2, 8, 8, 0)], ids=str)
def test_empty(shape):
    pool = Pool.square(3, 2, 1, True)
    x = on_gpu(torch.empty(shape))
    y, argmax = forward(x, pool)
    assert y.shape == argmax.shape == (shape[0], shape[3], 5, 5)
    assert backward(y, argmax, x.shape, pool).shape == x.shape


def test_nchw_input():
    pool = Pool.square(3, 2, 1, True)
    x = random_input((2, 9, 7, 16), torch.float16, 8)
    y, argmax = forward(on_gpu(x).contiguous(), pool)
    assert_same_bits(to_nhwc(y), reference_forward(x, pool)[0])
    assert_same_bits(to_nhwc(argmax), reference_forward(x, pool)[1])


def test_repeated_runs_give_the_same_bits():
    pool = Pool.square(3, 1, 1, True)
    x = on_gpu(random_input((8, 28, 28, 256), torch.float16, 9))
    y, argmax = forward(x, pool)
    grad_x = backward(x, argmax, x.shape, pool)
    for _ in range(10):
        again = forward(x, pool)
        assert torch.equal(again[0], y) and torch.equal(again[1], argmax)
        assert torch.equal(backward(x, argmax, x.shape, pool), grad_x)


def test_stream_and_graph():
    """The launch goes to the current stream and can be captured."""
    pool = Pool.square(3, 2, 0, True)
    first, second = (random_input((4, 56, 56, 64), torch.float16, seed) for seed in (10, 11))
    x = on_gpu(first)
    warm_up = forward(x, pool)  # loads the kernels, which a capture may not do
    backward(*warm_up, x.shape, pool)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y, argmax = forward(x, pool)
        grad_x = backward(y, argmax, x.shape, pool)
    x.copy_(second.permute(0, 3, 1, 2))
    graph.replay()
    torch.cuda.synchronize()
    expected_y, expected_argmax = reference_forward(second, pool)
    assert_same_bits(to_nhwc(y), expected_y)
    assert_same_bits(to_nhwc(argmax), expected_argmax)
    assert_same_bits(to_nhwc(grad_x), to_nhwc(backward(y, argmax, x.shape, pool)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_device_that_is_not_current():
    pool = Pool.square(3, 2, 0, True)
    x = random_input((2, 9, 7, 16), torch.float16, 12)
    y, argmax = forward(on_gpu(x).to("cuda:1"), pool)
    assert y.device == argmax.device == torch.device("cuda:1")
    assert_same_bits(to_nhwc(y), reference_forward(x, pool)[0])
