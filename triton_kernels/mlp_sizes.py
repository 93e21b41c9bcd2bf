"""Which perceptrons mlp.py can do, and should. Needs no Triton, so that ops can ask anywhere."""

# A program reads both weights whole from the L2 cache for its 128 rows: hidden * C / 32 bytes per row, at about
# 5.5 TB/s on an H100. What is saved is a write and a read of the hidden layer, 4 * hidden bytes per row at 3 TB/s.
# These are equal at 235 channels, by arithmetic and not by measurement; but above 128 the sums take the registers with
# which a second program would multiply while the first one activates.
MOST_CHANNELS = 128
