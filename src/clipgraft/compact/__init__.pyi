"""The public names of `clipgraft.compact`."""

from .model import Compacted as Compacted
from .model import compact_model as compact_model
from .write import write_compact as write_compact
