"""The public names of `clipgraft.compact`."""

from .args import CompactArgs as CompactArgs
from .model import Compacted as Compacted
from .model import compact_model as compact_model
from .model import write_compact as write_compact
