"""`window_partition` and `window_reverse`: every dtype, size and stride against pixels counted one by one; timm and
torchvision; gradients; the arithmetic of the CUDA kernel; compile."""

import itertools
import random

import pytest
import torch
from numerics import check_op
from torch._dynamo.testing import CompileCounterWithBackend

from bbfast import dispatch, extension
from bbfast.ops import window_partition, window_reverse

PAD_ORDERS = ("shift_then_pad", "pad_then_shift")
DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
)
BACKENDS = ("kernels", "torch")


@pytest.fixture(params=BACKENDS)
def backend(request, device, monkeypatch):
    """Runs on the extension, or on the reference; what nobody wrote is NaN, or the largest integer."""
    if request.param == "torch":
        monkeypatch.setenv("BBFAST_BACKEND", "torch")
    else:
        if extension.load() is None:
            pytest.skip(extension.unavailable_reason())
        if device == "cuda" and not extension.load().build_info()["cuda"]:
            pytest.skip("bbfast._C was built without CUDA")
        monkeypatch.setenv("BBFAST_STRICT", "1")
    torch.use_deterministic_algorithms(True)  # fills memory that is handed out
    yield request.param
    torch.use_deterministic_algorithms(False)


# ---- an independent reference: one pixel at a time ---------------------------------------------------------


def source_of(position: int, length: int, window: int, shift: int, pad_order: str) -> int:
    """Where the pixel at `position` of a rolled and padded axis comes from; -1 is padding."""
    padded = -(-length // window) * window
    pixels = list(range(length))
    if pad_order == "pad_then_shift":
        pixels += [-1] * (padded - length)
        return pixels[(position + shift) % padded]
    return pixels[(position + shift) % length] if position < length else -1


def source_table(size, window, shift, pad_order) -> torch.Tensor:
    """[n, tokens]: the pixel of a flattened map that each token of each window holds, or -1."""
    down, across = (-(-length // w) for length, w in zip(size, window))
    rows, columns = (
        [source_of(i, length, w, s, pad_order) for i in range(-(-length // w) * w)]
        for length, w, s in zip(size, window, shift)
    )
    return torch.tensor(
        [
            [
                -1 if y < 0 or x < 0 else y * size[1] + x
                for y in rows[i * window[0] : (i + 1) * window[0]]
                for x in columns[j * window[1] : (j + 1) * window[1]]
            ]
            for i in range(down)
            for j in range(across)
        ]
    )


def expected_windows(x, window, shift, pad_order):
    table = source_table(x.shape[1:3], window, shift, pad_order).to(x.device)
    pixels = torch.cat([x.new_zeros(x.shape[0], 1, x.shape[3]), x.reshape(x.shape[0], -1, x.shape[3])], 1)
    return pixels[:, table + 1].reshape(x.shape[0] * table.shape[0], table.shape[1], x.shape[3])


def random_map(shape, dtype, device) -> torch.Tensor:
    """Without zeros where the dtype allows, so that padding shows."""
    if dtype == torch.bool:
        return torch.rand(shape, device=device) < 0.8
    if not dtype.is_floating_point and not dtype.is_complex:
        return torch.randint(1, 127, shape, dtype=dtype, device=device)
    return torch.randn(shape, dtype=dtype, device=device)


def check(x, window, shift=(0, 0), pad_order="shift_then_pad"):
    """Partition against the reference, and the way back."""
    windows = window_partition(x, window, shift, pad_order=pad_order)
    expected = expected_windows(x, window, shift, pad_order)
    assert windows.dtype == x.dtype and windows.is_contiguous()
    assert torch.equal(windows, expected)
    poisoned = poison_padding(windows, x.shape[1:3], window, shift, pad_order)
    back = window_reverse(poisoned, window, tuple(x.shape[1:3]), shift, pad_order=pad_order)
    assert back.dtype == x.dtype and back.is_contiguous()
    assert torch.equal(back, x)


def poison_padding(windows, size, window, shift, pad_order):
    """Ones in what was padding; window_reverse must not let them through."""
    padding = (source_table(size, window, shift, pad_order) < 0).to(windows.device)
    batch = windows.shape[0] // padding.shape[0]
    return windows.masked_fill(padding.repeat(batch, 1).unsqueeze(2), True)


# ---- values ----------------------------------------------------------------------------------------------

SIZES = [(56, 56), (57, 61), (7, 7), (5, 9), (1, 30), (16, 24)]
WINDOWS_AND_SHIFTS = [
    ((7, 7), (0, 0)),
    ((7, 7), (3, 3)),
    ((4, 8), (2, 5)),
    ((8, 8), (0, 4)),
    ((12, 12), (6, 0)),
    ((5, 1), (1, 0)),
    ((64, 9), (40, 70)),  # larger than the map, and shifts beyond it
]


@pytest.mark.parametrize("pad_order", PAD_ORDERS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window, shift", WINDOWS_AND_SHIFTS)
def test_sizes_windows_and_shifts(backend, pad_order, size, window, shift, device):
    check(torch.randn(2, *size, 3, device=device), window, shift, pad_order)


@pytest.mark.parametrize("channels", [1, 3, 96])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_dtypes(backend, dtype, channels, device):
    x = random_map((2, 11, 15, channels), dtype, device)
    for pad_order in PAD_ORDERS:
        check(x, (7, 7), (3, 2), pad_order)


def test_bits_are_moved_not_numbers(backend, device):
    """NaN payloads and the sign of zero survive both ways."""
    bits = torch.randint(-(2**31), 2**31, (2, 9, 8, 4), device=device).to(torch.int32)
    bits[0, 0, 0, 0] = -(2**31)
    windows = window_partition(bits.view(torch.float32), (4, 4), (1, 3))
    assert torch.equal(windows.view(torch.int32), expected_windows(bits, (4, 4), (1, 3), "shift_then_pad"))
    back = window_reverse(windows, (4, 4), (9, 8), (1, 3))
    assert torch.equal(back.view(torch.int32), bits)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.uint64])
def test_rare_dtypes(backend, dtype, device):
    bits = {1: torch.uint8, 2: torch.int16, 8: torch.int64}[dtype.itemsize]
    x = random_map((1, 5, 6, 8), bits, device)
    windows = window_partition(x.view(dtype), 4, 1)
    assert torch.equal(windows.view(bits), expected_windows(x, (4, 4), (1, 1), "shift_then_pad"))
    assert torch.equal(window_reverse(windows, 4, (5, 6), 1).view(bits), x)


def views_of(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """[B, H, W, C] values behind other strides."""
    b, h, w, c = values.shape
    wider = values.new_zeros(b + 2, h + 3, 2 * w, c + 5)
    return {
        "permuted NCHW": values.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "transposed map": values.transpose(1, 2).contiguous().transpose(1, 2),
        "batch inside": values.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
        "slice": wider[1:-1, 2:-1, ::2, 3:-2].copy_(values),
        "rows of a slice": values.new_zeros(b, h + 4, w, c)[:, 3:-1].copy_(values),
        "every second channel": values.new_zeros(b, h, w, 2 * c)[..., ::2].copy_(values),
        "not aligned": values.new_zeros(values.numel() + 1)[1:].view(b, h, w, c).copy_(values),
    }


@pytest.mark.parametrize("pad_order", PAD_ORDERS)
@pytest.mark.parametrize("channels", [1, 3, 16])
def test_strided_maps(backend, channels, pad_order, device):
    values = torch.randn(3, 10, 13, channels, device=device)
    for name, view in views_of(values).items():
        print(name, view.stride())
        check(view, (4, 5), (2, 1), pad_order)
    check(values[:1].expand(4, -1, -1, -1), (4, 5), (2, 1), pad_order)
    check(values[:, :1, :1].expand(-1, 10, 13, -1), (4, 5), (2, 1), pad_order)


@pytest.mark.parametrize("pad_order", PAD_ORDERS)
def test_strided_windows(backend, pad_order, device):
    x = torch.randn(3, 10, 13, 8, device=device)
    windows = window_partition(x, (4, 5), (2, 1), pad_order=pad_order)
    views = (
        windows.transpose(0, 1).contiguous().transpose(0, 1),
        windows.permute(0, 2, 1).contiguous().permute(0, 2, 1),
        windows.new_zeros(2 * windows.shape[0], windows.shape[1] + 2, 11)[::2, 1:-1, 2:-1].copy_(windows),
    )
    for view in views:
        assert not view.is_contiguous()
        assert torch.equal(window_reverse(view, (4, 5), (10, 13), (2, 1), pad_order=pad_order), x)


def test_lazy_conjugation_is_resolved(backend, device):
    x = torch.randn(1, 5, 6, 2, dtype=torch.complex64, device=device)
    assert torch.equal(window_partition(x.conj(), 4, 1), window_partition(x, 4, 1).conj())
    negative = x.conj().imag
    assert negative.is_neg()
    assert torch.equal(window_partition(negative, 4, 1), -window_partition(x.imag.contiguous(), 4, 1))


def test_ints_mean_both_axes(backend, device):
    x = torch.randn(1, 9, 9, 2, device=device)
    assert torch.equal(window_partition(x, 4, 3), window_partition(x, (4, 4), (3, 3)))
    windows = window_partition(x, 4, 3)
    assert torch.equal(window_reverse(windows, 4, 9, 3), x)
    assert torch.equal(window_reverse(window_partition(x, 4), 4, (9, 9)), x)


@pytest.mark.parametrize("shape", [(0, 9, 5, 3), (2, 9, 5, 0)])
def test_empty(backend, shape, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    windows = window_partition(x, (4, 2), (1, 1))
    assert windows.shape == (shape[0] * 9, 8, shape[3])
    back = window_reverse(windows, (4, 2), (9, 5), (1, 1))
    assert back.shape == shape
    (grad,) = torch.autograd.grad(back.sum(), x)
    assert grad.shape == shape


@pytest.mark.parametrize("pad_order", PAD_ORDERS)
def test_more_windows_than_a_grid_axis_holds(backend, pad_order, device):
    x = torch.randint(1, 100, (90, 55, 57, 1), dtype=torch.uint8, device=device)
    windows = window_partition(x, 2, 1, pad_order=pad_order)
    assert windows.shape == (90 * 28 * 29, 4, 1) and windows.shape[0] > 65_535
    assert torch.equal(windows, expected_windows(x, (2, 2), (1, 1), pad_order))
    assert torch.equal(window_reverse(windows, 2, (55, 57), 1, pad_order=pad_order), x)


def test_same_result_on_any_number_of_threads():
    if extension.load() is None:
        pytest.skip(extension.unavailable_reason())
    x = torch.randn(3, 57, 61, 24)
    expected = expected_windows(x, (7, 7), (3, 3), "shift_then_pad")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            windows = window_partition(x, 7, 3)
            assert torch.equal(windows, expected)
            assert torch.equal(window_reverse(windows, 7, (57, 61), 3), x)
    finally:
        torch.set_num_threads(before)


def test_the_result_shares_no_memory_with_the_input(backend, device):
    x = torch.randn(2, 4, 4, 3, device=device)
    windows = window_partition(x, 4)
    back = window_reverse(windows, 4, 4)
    assert len({tensor.untyped_storage().data_ptr() for tensor in (x, windows, back)}) == 3


@pytest.mark.parametrize(
    "requested, chosen", [("auto", "kernels"), ("cuda", "cuda"), ("cpp", "cpp"), ("torch", "torch")]
)
def test_backends(requested, chosen, device, monkeypatch):
    """Which backend takes a call, and that an unfit one gives way to the reference with a warning."""
    if extension.load() is None:
        pytest.skip(extension.unavailable_reason())
    fitting = ("cuda" if extension.load().build_info()["cuda"] else "torch") if device == "cuda" else "cpp"
    chosen = fitting if chosen in ("kernels", fitting) else "torch"
    monkeypatch.setenv("BBFAST_BACKEND", requested)
    x = torch.randn(1, 5, 5, 2, device=device)
    if requested in ("cuda", "cpp") and chosen == "torch":
        with pytest.warns(dispatch.FallbackWarning, match="the tensor is not on"):
            windows = window_partition(x, 2, 1)
    else:
        windows = window_partition(x, 2, 1)
    assert dispatch.last_choices()["window_partition"].backend == chosen
    assert torch.equal(windows, expected_windows(x, (2, 2), (1, 1), "shift_then_pad"))


# ---- the arithmetic of the CUDA kernel, without a GPU and without memory -------------------------------------


def place_of(vector, size, pixel_bytes, vector_bytes, window, shift, pad_order):
    """Byte offsets of a vector in map and windows, in Python's integers."""
    _, height, width = size
    pixel, part = divmod(vector, pixel_bytes // vector_bytes)
    number, token = divmod(pixel, window[0] * window[1])
    band, across = divmod(number, -(-width // window[1]))
    sample, down = divmod(band, -(-height // window[0]))
    row, column = divmod(token, window[1])
    y = rolled(down * window[0] + row, height, window[0], shift[0], pad_order)
    x = rolled(across * window[1] + column, width, window[1], shift[1], pad_order)
    within = part * vector_bytes
    in_map = -1 if y is None or x is None else ((sample * height + y) * width + x) * pixel_bytes + within
    return [in_map, pixel * pixel_bytes + within]


def rolled(position, length, window, shift, pad_order):
    padded = -(-length // window) * window
    if pad_order == "shift_then_pad":
        return (position + shift) % length if position < length else None
    found = (position + shift) % padded
    return found if found < length else None


def number_of_vectors(size, pixel_bytes, vector_bytes, window):
    padded = [-(-length // w) * w for length, w in zip(size[1:], window)]
    return size[0] * padded[0] * padded[1] * (pixel_bytes // vector_bytes)


@pytest.mark.parametrize("pad_order", PAD_ORDERS)
@pytest.mark.parametrize("wide", [False, True])
def test_every_vector_of_a_small_map(pad_order, wide):
    if extension.load() is None:
        pytest.skip(extension.unavailable_reason())
    for size, window, shift in (((2, 9, 11), (4, 3), (1, 2)), ((3, 4, 5), (7, 6), (2, 9)), ((1, 8, 8), (8, 1), (0, 3))):
        config = (size, 24, 8, window, shift)
        vectors = torch.arange(number_of_vectors(size, 24, 8, window))
        places = extension.load().window_places(vectors, *config, pad_order == "pad_then_shift", wide)
        assert places.tolist() == [place_of(vector, *config, pad_order) for vector in vectors.tolist()]


# (B, H, W), bytes of a pixel and of a vector, window, shift, 64-bit indices
LARGE = [
    ((128, 56, 56), 192, 16, (7, 7), (3, 3), False),
    ((7000, 57, 61), 96, 16, (7, 7), (3, 3), False),  # more than 2^31 bytes, fewer vectors
    ((2**31 - 1, 1, 1), 1, 1, (1, 1), (0, 0), False),  # as many as 32 bits count
    ((2, 2**15 - 3, 2**15), 1, 1, (2**14 - 1, 2**13), (2**13, 5), False),
    ((1, 2, 2**29 + 1), 2, 2, (1, 3), (1, 2**29), False),
    ((2**20, 57, 61), 256, 16, (7, 7), (3, 3), True),
    ((3, 2**20 + 1, 2**20 - 1), 8, 8, (12, 5), (6, 2), True),
    ((1, 1, 2**31 + 5), 16, 16, (1, 2**16 + 1), (0, 2**31 - 1), True),
]


@pytest.mark.parametrize("pad_order", PAD_ORDERS)
@pytest.mark.parametrize("size, pixel_bytes, vector_bytes, window, shift, wide", LARGE)
def test_vectors_of_maps_beyond_two_gigabytes(size, pixel_bytes, vector_bytes, window, shift, wide, pad_order):
    if extension.load() is None:
        pytest.skip(extension.unavailable_reason())
    config = (size, pixel_bytes, vector_bytes, window, shift)
    total = number_of_vectors(size, pixel_bytes, vector_bytes, window)
    if not wide and total > 2**31 - 1:
        pytest.fail(f"{total} vectors need 64 bits; the case is wrong")
    vectors = [0, total - 1, *(random.randrange(total) for _ in range(3000))]
    places = extension.load().window_places(torch.tensor(vectors), *config, pad_order == "pad_then_shift", wide)
    assert places.tolist() == [place_of(vector, *config, pad_order) for vector in vectors]


def test_32_bit_indices_are_refused_where_they_do_not_fit():
    if extension.load() is None:
        pytest.skip(extension.unavailable_reason())
    config = ((2**31, 1, 1), 1, 1, (1, 1), (0, 0), False)
    with pytest.raises(ValueError, match="32-bit indices cannot count 2147483648 vectors"):
        extension.load().window_places(torch.tensor([0]), *config, False)


# ---- on a GPU ----------------------------------------------------------------------------------------------


@pytest.fixture
def cuda_kernels(monkeypatch):
    if extension.load() is None or not extension.load().build_info()["cuda"]:
        pytest.skip(extension.unavailable_reason() or "bbfast._C was built without CUDA")
    monkeypatch.setenv("BBFAST_BACKEND", "cuda")
    monkeypatch.setenv("BBFAST_STRICT", "1")


@pytest.mark.gpu
def test_the_current_stream_is_used(cuda_kernels):
    """A stream that is late: a kernel on any other one would read the zeros that were there before."""
    x, values = torch.zeros(8, 57, 61, 96, device="cuda"), torch.randn(8, 57, 61, 96, device="cuda")
    expected = expected_windows(values, (7, 7), (3, 3), "shift_then_pad")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        x.copy_(values)
        windows = window_partition(x, 7, 3)
        back = window_reverse(windows, 7, (57, 61), 3)
    torch.cuda.synchronize()
    assert torch.equal(windows, expected) and torch.equal(back, values)


@pytest.mark.gpu
def test_a_graph_captures_the_kernels(cuda_kernels):
    x = torch.randn(2, 9, 11, 8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        windows = window_partition(x, 4, 1)
        back = window_reverse(windows, 4, (9, 11), 1)
    values = torch.randn_like(x)
    x.copy_(values)
    graph.replay()
    assert torch.equal(windows, expected_windows(values, (4, 4), (1, 1), "shift_then_pad"))
    assert torch.equal(back, values)


@pytest.mark.gpu
def test_a_second_gpu(cuda_kernels):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(2, 9, 11, 8, device="cuda:1")
    windows = window_partition(x, 4, 1)
    assert windows.device == x.device
    assert torch.equal(windows, expected_windows(x, (4, 4), (1, 1), "shift_then_pad"))


@pytest.mark.gpu
@pytest.mark.parametrize("pad_order", PAD_ORDERS)
def test_more_vectors_than_32_bits_count(cuda_kernels, pad_order):
    height, width = 2**16 + 1, 2**15 + 3
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    x = torch.randint(1, 256, (1, height, width, 1), dtype=torch.uint8, device="cuda")
    windows = window_partition(x, (64, 48), (3, 5), pad_order=pad_order)
    assert windows.numel() > 2**31
    assert torch.equal(window_reverse(windows, (64, 48), (height, width), (3, 5), pad_order=pad_order), x)
    across = -(-width // 48)
    for _ in range(200):
        row, column = random.randrange(height // 64 * 64), random.randrange(width // 48 * 48)
        y, source_x = (
            rolled(row, height, 64, 3, pad_order),
            rolled(column, width, 48, 5, pad_order),
        )
        expected = 0 if y is None or source_x is None else x[0, y, source_x, 0].item()
        token = row % 64 * 48 + column % 48
        assert windows[row // 64 * across + column // 48, token, 0].item() == expected


# ---- timm and torchvision --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(56, 56), (57, 61), (9, 30)])
@pytest.mark.parametrize("window, shift", [((7, 7), (3, 3)), ((7, 7), (0, 0)), ((4, 8), (2, 3))])
def test_shift_then_pad_is_timms_block(backend, size, window, shift, device):
    """A Swin block whose attention turns the tokens of each window around."""
    swin = pytest.importorskip("timm.models.swin_transformer")
    block = swin.SwinTransformerBlock(8, size, 1, window_size=window, shift_size=shift, always_partition=True)

    class TurnAround(torch.nn.Module):
        def forward(self, windows, mask=None):
            self.windows = windows
            return windows.flip(1)

    block.attn = TurnAround()
    x = torch.randn(2, *size, 8, device=device)
    y = block.to(device)._attn(x)
    windows = window_partition(x, window, shift)
    assert torch.equal(windows, block.attn.windows)
    assert torch.equal(window_reverse(windows.flip(1), window, size, shift), y)


@pytest.mark.parametrize("size", [(14, 21), (15, 13), (9, 30)])
@pytest.mark.parametrize("window, shift", [((7, 7), (3, 3)), ((7, 7), (0, 0)), ((4, 8), (2, 3))])
def test_pad_then_shift_is_torchvisions_attention(backend, size, window, shift, device):
    """Its own function, with a bias that makes each token attend to one token alone, the opposite one."""
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    channels, tokens = 8, window[0] * window[1]
    x = torch.randn(2, *size, channels, device=device)
    only_values = torch.cat([torch.zeros(2 * channels, channels), torch.eye(channels)]).to(device)
    bias = torch.full((tokens, tokens), -torch.inf, device=device)
    bias.fill_diagonal_(0)
    y = swin.shifted_window_attention(
        x, only_values, torch.eye(channels, device=device), bias.flip(1), list(window), 1, list(shift)
    )
    windows = window_partition(x, window, shift, pad_order="pad_then_shift")
    assert torch.equal(window_reverse(windows.flip(1), window, size, shift, pad_order="pad_then_shift"), y)


def test_pad_orders_differ_exactly_where_the_window_does_not_divide(device):
    for size, same in (((8, 12), True), ((9, 12), False)):
        x = torch.randn(1, *size, 2, device=device)
        windows = [window_partition(x, 4, 1, pad_order=pad_order) for pad_order in PAD_ORDERS]
        assert torch.equal(*windows) == same


# ---- gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_order", PAD_ORDERS)
@pytest.mark.parametrize(
    "size, window, shift", [((5, 9), (7, 7), (3, 3)), ((8, 6), (4, 3), (1, 2)), ((3, 4), (2, 5), (0, 1))]
)
def test_gradients(backend, size, window, shift, pad_order, device):
    """Of any order, against finite differences and, as gathers, to the bit."""
    x = torch.randn(1, *size, 2, dtype=torch.float64, device=device, requires_grad=True)

    def partition(x):
        return window_partition(x, window, shift, pad_order=pad_order)

    def reverse(windows):
        return window_reverse(windows, window, size, shift, pad_order=pad_order)

    windows = partition(x).detach().requires_grad_()
    for function, argument in ((partition, x), (reverse, windows)):
        torch.autograd.gradcheck(function, (argument,))
        torch.autograd.gradgradcheck(function, (argument,))

    grad_windows = torch.randn(windows.shape[2], *windows.shape[:2], dtype=torch.float64, device=device).movedim(0, -1)
    (ours,) = torch.autograd.grad(partition(x), x, grad_windows)
    (theirs,) = torch.autograd.grad(expected_windows(x, window, shift, pad_order), x, grad_windows)
    assert torch.equal(ours, theirs)
    grad_x = torch.randn(1, 2, *size, dtype=torch.float64, device=device).permute(0, 2, 3, 1)
    (ours,) = torch.autograd.grad(reverse(windows), windows, grad_x)
    assert torch.equal(ours, expected_windows(grad_x, window, shift, pad_order))  # zeros in the padding


@pytest.mark.parametrize("pad_order", PAD_ORDERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_each_is_the_others_adjoint(backend, pad_order, dtype, device):
    """<partition(x), y> == <x, reverse(y)>, summed over whole numbers so that nothing rounds."""
    x = torch.randint(-9, 10, (2, 13, 17, 3), device=device).to(dtype)
    windows = window_partition(x, (7, 4), (3, 1), pad_order=pad_order)
    y = torch.randint(-9, 10, windows.shape, device=device).to(dtype)
    back = window_reverse(y, (7, 4), (13, 17), (3, 1), pad_order=pad_order)
    assert (windows * y).sum() == (x * back).sum() != 0


def test_gradients_of_complex_and_half_maps(backend, device):
    for dtype in (torch.complex64, torch.float16, torch.bfloat16):
        x = torch.randn(2, 5, 6, 4, dtype=dtype, device=device, requires_grad=True)
        windows = window_partition(x, 4, 2)
        grad = torch.randn_like(windows)
        (found,) = torch.autograd.grad(windows, x, grad)
        assert torch.equal(found, window_reverse(grad, 4, (5, 6), 2))


def test_inference_and_integers_record_nothing(backend, device):
    x = torch.randn(1, 5, 5, 2, device=device, requires_grad=True)
    with torch.no_grad():
        assert not window_partition(x, 2).requires_grad
    with torch.inference_mode():
        assert window_partition(x, 2).is_inference()
    assert not window_partition(x.detach().int(), 2).requires_grad


# ---- torch.library, compile --------------------------------------------------------------------------------


def test_opcheck(backend, device):
    torch.use_deterministic_algorithms(False)  # opcheck compares with what its own tracing made of it
    values = torch.randn(2, 5, 9, 3, device=device)
    ops, window, shift = torch.ops.bbfast, (4, 7), (1, 3)
    traced, pad_orders = backend == "torch", itertools.cycle(PAD_ORDERS)
    for x, pad_order in zip((values, *views_of(values).values()), pad_orders):
        check_op(ops.window_partition.default, (x, window, shift, pad_order), traced=traced)
    windows = window_partition(values, window, shift)
    views = (windows, windows.transpose(0, 1).contiguous().transpose(0, 1), windows.mT.contiguous().mT)
    for w, pad_order in zip(views, pad_orders):
        check_op(ops.window_reverse.default, (w, window, (5, 9), shift, pad_order), traced=traced)


@pytest.mark.parametrize("pad_order", PAD_ORDERS)
def test_compile(backend, pad_order, device):
    """Forward and backward in one graph; a third image size compiles nothing new."""

    def function(x):
        windows = window_partition(x * 2, (4, 7), (2, 3), pad_order=pad_order)
        return window_reverse(windows.sin(), (4, 7), (x.shape[1], x.shape[2]), (2, 3), pad_order=pad_order)

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for size in ((9, 12), (13, 17), (20, 22), (8, 14)):
        x = torch.randn(3, *size, 5, device=device, requires_grad=True)
        y, expected = compiled(x), function(x)
        assert torch.equal(y, expected)
        grad = torch.randn_like(y)
        assert torch.equal(*(torch.autograd.grad(out, x, grad)[0] for out in (y, expected)))
    assert counter.frame_count == 1


# ---- bad input -------------------------------------------------------------------------------------------

MAP, WINDOWS = torch.zeros(2, 5, 6, 3), torch.zeros(18, 4, 3)
SPARSE = torch.zeros(2, 5, 6, 3).to_sparse()


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": None}, TypeError, "x must be a torch.Tensor, got NoneType"),
        ({"x": torch.zeros(5, 6, 3)}, ValueError, r"x must have 4 dimensions \[B, H, W, C\], got shape \(5, 6, 3\)"),
        ({"x": torch.zeros(2, 0, 6, 3)}, ValueError, "x has an empty map"),
        ({"x": torch.zeros(2, 5, 0, 3)}, ValueError, "x has an empty map"),
        ({"x": SPARSE}, TypeError, "x has layout torch.sparse_coo"),
        ({"window_size": 0}, ValueError, "window_size=0"),
        ({"window_size": (2, -1)}, ValueError, r"window_size=\(2, -1\)"),
        ({"window_size": (2, 2, 2)}, ValueError, "window_size must be an int or two ints"),
        ({"window_size": 2.0}, TypeError, "window_size must be an int or two ints"),
        ({"window_size": 2**31}, ValueError, "window_size=2147483648 is not allowed; it must be at most"),
        ({"shift_size": -1}, ValueError, "shift_size=-1"),
        ({"shift_size": True}, TypeError, "shift_size must be an int or two ints"),
        ({"shift_size": (0, 2**40)}, ValueError, "shift_size=.* it must be at most"),
        ({"pad_order": "pad"}, ValueError, "pad_order='pad' is not known; allowed: shift_then_pad, pad_then_shift"),
        ({"pad_order": None}, TypeError, "pad_order must be a string, got NoneType"),
    ],
)
def test_bad_input_of_partition(change, error, words):
    with pytest.raises(error, match=words):
        window_partition(**{"x": MAP, "window_size": 2} | change)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"windows": [1]}, TypeError, "windows must be a torch.Tensor, got list"),
        ({"windows": MAP}, ValueError, "windows must have 3 dimensions"),
        ({"windows": SPARSE}, TypeError, "windows has layout torch.sparse_coo"),
        ({"windows": torch.zeros(13, 4, 3)}, ValueError, r"windows must have shape \[B \* 9, 4, C\] for window_size="),
        ({"windows": torch.zeros(18, 5, 3)}, ValueError, r"windows must have shape \[B \* 9, 4, C\]"),
        ({"window_size": 0}, ValueError, "window_size=0"),
        ({"image_size": (5, 0)}, ValueError, r"image_size=\(5, 0\)"),
        ({"image_size": None}, TypeError, "image_size must be an int or two ints"),
        ({"image_size": 2**31}, ValueError, "image_size=2147483648 is not allowed"),
        ({"shift_size": (0, -2)}, ValueError, r"shift_size=\(0, -2\)"),
        ({"pad_order": "none"}, ValueError, "pad_order='none' is not known"),
        ({"pad_order": 1}, TypeError, "pad_order must be a string, got int"),
    ],
)
def test_bad_input_of_reverse(change, error, words):
    with pytest.raises(error, match=words):
        window_reverse(**{"windows": WINDOWS, "window_size": 2, "image_size": (5, 6)} | change)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_tensors_are_refused():
    x, windows = (torch.quantize_per_tensor(values, 1.0, 0, torch.quint8) for values in (MAP, WINDOWS))
    with pytest.raises(TypeError, match=r"x has dtype torch\.quint8; quantized tensors are not taken"):
        window_partition(x, 2)
    with pytest.raises(TypeError, match=r"windows has dtype torch\.quint8; quantized tensors are not taken"):
        window_reverse(windows, 2, (5, 6))


EXTENSION_ERRORS = {
    "x must have 4 dimensions": ("window_partition", (torch.zeros(5, 6, 3), (2, 2), (0, 0), False)),
    "x has an empty map": ("window_partition", (torch.zeros(1, 0, 6, 3), (2, 2), (0, 0), False)),
    "x must be a dense tensor": ("window_partition", (SPARSE, (2, 2), (0, 0), False)),
    "x must be on the CPU": ("window_partition", (MAP.to("meta"), (2, 2), (0, 0), False)),
    "window_size holds 0": ("window_partition", (MAP, (2, 0), (0, 0), False)),
    "shift_size holds -1": ("window_partition", (MAP, (2, 2), (-1, 0), False)),
    "windows must have 3 dimensions": ("window_reverse", (MAP, (2, 2), (5, 6), (0, 0), False)),
    r"windows must have shape \[B \* 9, 4, C\], got \[13, 4, 3\]": (
        *("window_reverse", (torch.zeros(13, 4, 3), (2, 2), (5, 6), (0, 0), False)),
    ),
    "image_size holds 0": ("window_reverse", (WINDOWS, (2, 2), (0, 6), (0, 0), False)),
}


@pytest.mark.parametrize("message", EXTENSION_ERRORS)
def test_the_extension_names_bad_arguments_too(message):
    if extension.load() is None:
        pytest.skip(extension.unavailable_reason())
    name, args = EXTENSION_ERRORS[message]
    with pytest.raises(ValueError, match=message):
        getattr(extension.load(), name)(*args)
