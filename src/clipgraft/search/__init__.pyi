"""The public names of `clipgraft.search`."""

from .args import EncodeArgs as EncodeArgs
from .encode import EncodeResult as EncodeResult
from .encode import encode_folder as encode_folder
from .export.driver import ExportResult as ExportResult
from .export.driver import export_vectors as export_vectors
from .index import build_index as build_index
from .searcher import Hit as Hit
from .searcher import Hits as Hits
from .searcher import load_model as load_model
from .searcher import query as query
