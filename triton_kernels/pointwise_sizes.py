"""Which products of matrices pointwise.py can do, and should. Needs no Triton, so that ops can ask anywhere."""

# Elements that divide K, N and the distances of rows: 16 bytes of fp16 or bf16.
UNIT = 8
MOST_ROWS = 2**31 - 1


def pays(summed: int, columns: int, gated: bool) -> bool:
    """Whether a product over `summed` elements to `columns` is limited by memory, so that saved trips count.

    By arithmetic, not by measurement: a tile of 128 by 128 takes summed / 32 bytes per output from the L2 cache, at
    about 5.5 TB/s on an H100, where cuBLAS with its clusters comes near the tensor cores' rate. That costs 2.6e-15 s
    per output and summed element; a write and a read of y that do not happen save 4 bytes at 3 TB/s, 1.3e-12 s per
    output: as much as 512 summed elements cost. Where columns are few x is the larger map, and is read once either
    way; a gate saves a write and a read of x.
    """
    return gated or summed <= 512 or columns <= 256
