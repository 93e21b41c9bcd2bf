"""What a launch costs at least: the bytes it must move, and the instructions that its warps issue, loop by loop.

Instructions come from the disassembly: what stands in no loop counts once per program, a loop's body as often as the
launch's arguments say. Code that branches around work counts as if no branch were taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from bbfast.benchmarks.kernel_launches import Argument, Launch
from bbfast.benchmarks.sass import Function, Loop, access_bytes, global_accesses, kind

SECTOR_BYTES = 32
VECTOR_BYTES = 16
# Parameters that kernels write, of those that are as large as what they read; backward reads the sum.
WRITTEN = {"y_ptr", "grad_x_ptr", "grad_residual_ptr", "grad_branch_ptr", "norm_ptr"}
WRITTEN_FORWARD = {*WRITTEN, "total_ptr"}


@dataclass
class Work:
    """The work of one launch; None where the loops do not tell.

    Attributes:
        outputs: output elements that the launch's tiles hold, padding included; of attention kernels scores, each of
            which is much more work; of second stages the partial sums that they add up.
        per_output: lane-instructions per output.
        lane_instructions: of the whole launch, 32 for each instruction of a warp.
        traffic_bytes: each tensor once, halos left out. Of attention kernels in whole sectors, as each head's rows
            are read.
        bias_bytes: of attention kernels, what of them is the bias.
        least_bytes: of attention kernels, the large tensors alone, each once.
        vector_bytes: of depthwise kernels, what a thread loads at once, by the strides of the tensors and the tile.
        halo: of depthwise forwards, input positions that all tiles read together over those there are.
        narrow: accesses of less than 16 bytes per thread where the strides of large tensors allow 16.
    """

    traffic_bytes: int
    outputs: int | None = None
    per_output: float | None = None
    lane_instructions: float | None = None
    bias_bytes: int | None = None
    least_bytes: int | None = None
    vector_bytes: int | None = None
    halo: float | None = None
    read_per_output_byte: float | None = None
    narrow: list[str] = field(default_factory=list)


def work_of(launch: Launch, function: Function, num_warps: int, arch: int) -> Work:
    """The work of a launch whose kernel was compiled to `function`."""
    values = launch.values
    work = Work(traffic_bytes=sum(tensor.nbytes for tensor in launch.tensors.values()))
    threads = 32 * num_warps
    if "TILE_S" in values:
        _depthwise(work, launch, function, threads)
    elif launch.name.startswith("_window_attention"):
        _attention(work, launch, function, threads, arch)
    elif launch.name == "_pointwise_kernel":
        _pointwise(work, launch, function, threads)
    elif launch.name == "_mlp_kernel":
        _mlp(work, launch, function, threads)
    elif "tiles_per_program" in values:
        _walk(work, launch, function, threads)
    elif "num_partials" in values:
        _second_stage(work, launch, function, threads)
    elif not function.loops:
        work.outputs = max(tensor.numel for tensor in launch.tensors.values())
        work.lane_instructions = launch.programs * threads * len(function.opcodes)
        work.per_output = work.lane_instructions / work.outputs
    return work


# ---- elementwise kernels and their reductions ------------------------------------------------------------


def _walk(work: Work, launch: Launch, function: Function, threads: int) -> None:
    """Kernels whose programs walk over tiles of channels and positions, or of rows, in one loop."""
    values = launch.values
    walk = values.get("WALK")
    block = walk.block_c * walk.block_p if walk else values["BLOCK_R"] * values["BLOCK_C"]
    runs = -(-values["tiles"] // values["tiles_per_program"])
    tiles = values["tiles"] * (launch.programs // runs)
    work.outputs = tiles * block
    if len(function.loops) <= 1 and (function.loops or values["tiles_per_program"] == 1):
        body = sum(loop.length for loop in function.loops)
        work.lane_instructions = threads * (launch.programs * function.outside + tiles * body)
        work.per_output = work.lane_instructions / work.outputs
    region = function.body(function.loops[0]) if len(function.loops) == 1 else function.opcodes
    unit = walk.vec if walk else values["UNIT"]
    # Of whole rows the compiler leaves out what lies behind the last channel.
    inside = block if walk else values["BLOCK_R"] * values["C"]
    work.narrow = _missing_vectors(launch, region, unit, inside / threads)


def _missing_vectors(launch: Launch, region, unit: int, elements_per_thread: float) -> list[str]:
    """Whether a tile of each large tensor moves in accesses of 16 bytes where `unit` elements lie side by side."""
    claimed = {"load": 0.0, "store": 0.0}
    size = max(tensor.numel for tensor in launch.tensors.values())
    written = WRITTEN_FORWARD if "_forward_" in launch.name else WRITTEN
    for name, tensor in launch.tensors.items():
        dense = 1 in tensor.stride
        wide = min(unit, elements_per_thread) * tensor.dtype.itemsize >= VECTOR_BYTES
        if tensor.numel == size and dense and wide:
            claimed["store" if name in written else "load"] += elements_per_thread * tensor.dtype.itemsize
    found = global_accesses(region)
    return [
        f"{found.get(f'{which} {VECTOR_BYTES}', 0)} of {wanted / VECTOR_BYTES:g} 16-byte {which}s"
        for which, wanted in claimed.items()
        if found.get(f"{which} {VECTOR_BYTES}", 0) * VECTOR_BYTES < wanted
    ]


def _second_stage(work: Work, launch: Launch, function: Function, threads: int) -> None:
    """Kernels that add up partial sums, in one loop after the other; the compiler may have unrolled them."""
    values = launch.values
    block_k = values.get("BLOCK_K") or values["BLOCK_C"]
    trips = -(-values["num_partials"] // values["BLOCK_P"])
    tile_bytes = values["BLOCK_P"] * block_k * 4 / threads
    work.outputs = launch.values["partials_ptr"].numel
    # Statistics come in rows: the first sweep reads all but M2, the second all but, at most, one more.
    rows = values.get("ROWS", 1)
    per_warp = function.outside
    for loop, tensors in zip(function.outer_loops, (1,) if rows == 1 else (rows - 1, rows)):
        loaded = sum(access_bytes(opcode) for opcode in function.body(loop) if kind(opcode) == "global loads")
        per_warp += trips * loop.length / max(1, round(loaded / (tile_bytes * tensors)))
    work.lane_instructions = launch.programs * threads * per_warp
    work.per_output = work.lane_instructions / work.outputs


# ---- depthwise convolution -------------------------------------------------------------------------------

# Loops within loops, from the outermost: images, positions along S ("walk"), kernel rows.
DEPTHWISE_NESTS = {
    "_forward_kernel": ("walk", "rows"),
    "_statistics_kernel": ("images", "walk", "rows"),
    "_conv_grad_kernel": ("images", "walk", "rows"),
    "_input_grad_kernel": ("walk", "rows"),
    "_weight_grad_kernel": ("images", "walk"),
}


def _depthwise(work: Work, launch: Launch, function: Function, threads: int) -> None:
    values = launch.values
    x: Argument = values.get("x_ptr") or values["dz_ptr"]
    on_inputs = launch.name == "_input_grad_kernel"
    size_s = values["in_s"] if on_inputs else values["out_s"]
    tiles = x.shape[0] * values["c_tiles"] * values["t_tiles"] * -(-size_s // values["TILE_S"])
    positions = values["BLOCK_T"] * values["BLOCK_C"] * values["TILE_S"] * (values["STRIDE_T"] if on_inputs else 1)
    work.outputs = tiles * positions
    per_thread = max(1, values["BLOCK_T"] * values["BLOCK_C"] // threads)
    work.vector_bytes = min(values["VECTOR"], per_thread) * x.dtype.itemsize

    names = DEPTHWISE_NESTS[launch.name]
    walk = None
    if len(function.nest) == len(names):
        loops = dict(zip(names, function.nest))
        walk = loops["walk"]
        per_tile = walk.length + _repeated_rows(launch, function, walk)
        visits = tiles * values.get("row_groups", 1)
        work.per_output = visits * per_tile * threads / work.outputs
        work.lane_instructions = threads * (visits * per_tile + launch.programs * function.outside)
    if work.vector_bytes == VECTOR_BYTES:
        work.narrow = _narrow(function.body(walk) if walk else function.opcodes)
    if launch.name == "_forward_kernel":
        images = x.shape[0]
        pixels_in, pixels_out = values["in_t"] * values["in_s"], values["out_t"] * values["out_s"]
        work.traffic_bytes = images * x.shape[1] * (pixels_in + pixels_out) * x.dtype.itemsize
        work.halo = _halo(values, "T", values["BLOCK_T"]) * _halo(values, "S", values["span"])
        work.read_per_output_byte = work.halo * pixels_in / pixels_out


def _repeated_rows(launch: Launch, function: Function, walk: Loop) -> float:
    """Instructions of kernel rows beyond those that the body of `walk` shows once."""
    values = launch.values
    if launch.name == "_weight_grad_kernel":
        return 0
    inner = [loop for loop in function.loops if walk.holds(loop)]
    if launch.name != "_input_grad_kernel":
        return (values["KERNEL_T"] - 1) * max(loop.length for loop in inner)
    # One loop for each residue that more than one tap reaches.
    taps = [-(-(values["KERNEL_T"] - first) // values["TAP_STEP"]) for first in values["FIRST_TAPS"]]
    repeated = [count - 1 for count in taps if count > 1]
    return sum(count * loop.length for count, loop in zip(repeated, sorted(inner, key=lambda loop: loop.first)))


def _narrow(opcodes, but: int = 0) -> list[str]:
    """Accesses of less than 16 bytes, `but` those of so many."""
    counts = global_accesses(opcodes)
    narrow = {name: n for name, n in counts.items() if int(name.split()[1]) < VECTOR_BYTES}
    return [f"{n} {name.replace(' ', 's of ')} bytes" for name, n in narrow.items() if int(name.split()[1]) != but]


def _halo(values: dict, axis: str, block: int) -> float:
    """Input positions that all tiles along an axis read together, over the positions there are."""
    lower = axis.lower()
    size_in, size_out, pad = values[f"in_{lower}"], values[f"out_{lower}"], values[f"pad_{lower}"]
    stride, reach = values[f"STRIDE_{axis}"], (values[f"KERNEL_{axis}"] - 1) * values[f"DILATION_{axis}"]
    read = 0
    for first in range(0, size_out, block):
        last = min(first + block, size_out) - 1
        read += min(last * stride - pad + reach + 1, size_in) - max(first * stride - pad, 0)
    return read / size_in


# ---- products of matrices --------------------------------------------------------------------------------


def _pointwise(work: Work, launch: Launch, function: Function, threads: int) -> None:
    """One loop over the summed elements, and what follows it."""
    values = launch.values
    tile = values["BLOCK_M"] * values["BLOCK_N"]
    work.outputs = launch.programs * tile
    trips = -(-values["k_units"] * values["UNIT"] // values["BLOCK_K"])
    if len(function.loops) <= 1:
        body = sum(loop.length for loop in function.loops)
        work.per_output = (function.outside + trips * body) * threads / tile
        work.lane_instructions = work.per_output * work.outputs
    # Vectors over columns are loaded as they fall to the threads; tiles of x and weight go straight to shared memory.
    straight = [opcode for opcode in function.opcodes if opcode.startswith("LDGSTS")]
    looped = function.body(function.loops[0]) if function.loops else ()
    stores = [opcode for opcode in function.opcodes if kind(opcode) == "global stores"]
    weight_bytes = values["BLOCK_N"] * values["BLOCK_K"] * values["weight_ptr"].dtype.itemsize // threads
    work.narrow = _narrow([*looped, *straight, *stores], but=weight_bytes)


def _mlp(work: Work, launch: Launch, function: Function, threads: int) -> None:
    """One loop over the hidden layer's units, and what stands around it; outputs are y's, padding of tiles included."""
    values = launch.values
    tile = values["BLOCK_M"] * (values["LEFT"] + values["RIGHT"])
    work.outputs = launch.programs * tile
    trips = -(-values["hidden_units"] * values["UNIT"] // values["BLOCK_H"])
    if len(function.loops) == 1:
        work.per_output = (function.outside + trips * function.loops[0].length) * threads / tile
        work.lane_instructions = work.per_output * work.outputs
    # Vectors are loaded as they fall to the threads, and small tiles of the weights, which come from the L2 cache.
    work.narrow = _narrow([opcode for opcode in function.opcodes if kind(opcode) == "global stores"])


# ---- windowed attention ----------------------------------------------------------------------------------


def _attention(work: Work, launch: Launch, function: Function, threads: int, arch: int) -> None:
    """Kernels that loop over windows and, where they are large, over tiles inside.

    The mask counts as if every window had one. In sm_100's pipelined loops over tiles there is no telling which is
    which.
    """
    values = launch.values
    qkv, bias, heads = values["qkv_ptr"], values["bias_ptr"], values["heads"]
    name = launch.name.strip("_")
    # Rows of C channels per token: q, k, v and y; q, k, v, dy, dq, dk and dv.
    rows = {"window_attention_forward_kernel": 4, "window_attention_backward_kernel": 7}.get(name)
    if rows:
        tokens, row_bytes = math.prod(qkv.shape[:3]), values["HEAD_DIM"] * qkv.dtype.itemsize
        firsts = range(0, heads * row_bytes, row_bytes)
        sectors = sum(-(-(first + row_bytes) // SECTOR_BYTES) - first // SECTOR_BYTES for first in firsts)
        partials = sum(tensor.nbytes for key, tensor in launch.tensors.items() if "partials" in key)
        work.least_bytes = rows * tokens * heads * row_bytes
        work.bias_bytes = bias.nbytes
        work.traffic_bytes = rows * tokens * sectors * SECTOR_BYTES + bias.nbytes + partials
    if qkv.stride[3] == 1 and all(stride % 16 == 0 for stride in qkv.stride[:3]) and qkv.dtype != torch.float32:
        # One fp32 value per row of scores is all that they have to move; rows lie on neighbouring lanes.
        row_sums = 4 if "row_sums_ptr" in launch.tensors else 0
        work.narrow = _narrow(function.body(function.nest[0]) if function.nest else function.opcodes, but=row_sums)

    tiles = values["QUERY_TILES"] * values["KEY_TILES"]
    windows = values["num_windows"] * heads
    work.outputs = windows * tiles * values["BLOCK_Q"] * values["BLOCK_K"]
    if tiles == 1:
        looped = values["windows_per_program"] > 1
        if looped and not function.nest:
            return
        body = function.nest[0].length if looped else len(function.opcodes)
        outside = len(function.opcodes) - body
        work.per_output = body * threads / (values["BLOCK_Q"] * values["BLOCK_K"])
        work.lane_instructions = threads * (launch.programs * outside + windows * body)
    elif arch < 100 and function.loops:
        inner = sorted(loop.length for loop in function.loops)
        outer = inner.pop() if values["windows_per_program"] > 1 else len(function.opcodes)
        part = name.split("_", 2)[2].removesuffix("_kernel")
        walked = {"key_grad": values["QUERY_TILES"], "bias_grad": 1}.get(part, values["KEY_TILES"])
        per_thread = walked * values["BLOCK_Q"] * values["BLOCK_K"] / threads
        work.per_output = (outer + (walked - 1) * sum(inner)) / per_thread
        work.lane_instructions = work.per_output * work.outputs
