"""The public names of `clipgraft.search`."""

from .encode import EncodeResult as EncodeResult
from .encode import encode_folder as encode_folder
from .hits import Hit as Hit
from .index import build_index as build_index
from .searcher import query as query
