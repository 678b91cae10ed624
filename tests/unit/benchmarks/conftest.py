"""Benchmarks are scripts: what they share, they import from their own folder."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))
