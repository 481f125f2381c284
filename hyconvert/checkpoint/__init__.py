"""Reading any base checkpoint, and writing the converted one safely."""

from hyconvert.checkpoint.opening import open_source
from hyconvert.checkpoint.source import Shard, Source, TensorInfo

__all__ = ["Shard", "Source", "TensorInfo", "open_source"]
