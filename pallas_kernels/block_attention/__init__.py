"""Native sparse attention: compressed blocks, selected blocks and a window, merged by gates."""

from pallas_kernels.block_attention.api import block_attention, block_attention_extend
from pallas_kernels.block_attention.blocks import BlockCache, init_block_cache

__all__ = ["BlockCache", "block_attention", "block_attention_extend", "init_block_cache"]
