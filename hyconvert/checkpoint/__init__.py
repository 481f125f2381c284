"""Reading any base checkpoint, and writing the converted one safely."""

from hyconvert.checkpoint.opening import open_source, recorded_name
from hyconvert.checkpoint.source import Shard, Source, TensorInfo
from hyconvert.checkpoint.writer import CheckpointWriter

__all__ = ["CheckpointWriter", "Shard", "Source", "TensorInfo", "open_source", "recorded_name"]
