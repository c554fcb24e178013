"""`benchmarks` stands beside `src` and is not installed: tests find it from the repository's root."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
