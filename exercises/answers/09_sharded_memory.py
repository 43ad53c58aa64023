"""Answers to exercise 9.

Which is larger? The share of the moments, 2 * 4 * 8.06e9 / 8 = 8.1 GB. Two blocks are .9 GB.
"""


def block_parameters(depth):
    D = 64 * depth
    qkv = D * 3 * D + 3 * D
    projection = D * D + D
    mlp = D * 4 * D + 4 * D + 4 * D * D + D
    modulation = D * 6 * D + 6 * D
    return 2 * (qkv + projection + mlp + modulation + 2 * 64)


def state_bytes(parameters, shards):
    return 4 * 4 * parameters / shards


def gathered_bytes(block, outside):
    return 2 * (2 * block + outside)


def sent_bytes(parameters, shards):
    return (2 * 2 + 4) * parameters * (shards - 1) / shards
