"""Weights of few bits: how a matrix is rounded, and the parts that a target's operator reads it in."""

from exporter.rounding.base import BLOCKS, SCALES, VALUES, ZERO_POINTS, BlockRounding, Grid, Rounding
from exporter.rounding.nbits import BlockNBits
from exporter.rounding.tensorrt import BlockInt4, ChannelFp8

__all__ = [
    "BLOCKS",
    "SCALES",
    "VALUES",
    "ZERO_POINTS",
    "BlockInt4",
    "BlockNBits",
    "BlockRounding",
    "ChannelFp8",
    "Grid",
    "Rounding",
]
