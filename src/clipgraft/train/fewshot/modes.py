"""The feature modes by name."""

from __future__ import annotations

from collections.abc import Mapping

from clipgraft.train.fewshot.features import FeatureMode
from clipgraft.train.fewshot.linear_probe import LinearProbe
from clipgraft.train.fewshot.prolip import ProLip
from clipgraft.train.fewshot.tip_adapter import TipAdapter, TipAdapterF

FEATURE_MODES: Mapping[str, FeatureMode] = {
    mode.name: mode for mode in (TipAdapter(), TipAdapterF(), ProLip(), LinearProbe())
}
