"""The public names of `clipgraft.models`."""

from .clip import Clip as Clip
from .sites import Site as Site
from .unloaded import clip_on_meta as clip_on_meta
