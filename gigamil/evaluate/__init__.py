"""From predictions and attention of a run to metrics with intervals, figures, heatmaps and one report."""

from gigamil.evaluate.attention import Attention, lesion_hit, read_attention, write_attention
from gigamil.evaluate.heatmap import draw_heatmap, heatmap_run
from gigamil.evaluate.predictions import Predictions, read_predictions, write_predictions
from gigamil.evaluate.report import evaluate_run, write_report

__all__ = [
    "Attention",
    "Predictions",
    "draw_heatmap",
    "evaluate_run",
    "heatmap_run",
    "lesion_hit",
    "read_attention",
    "read_predictions",
    "write_attention",
    "write_predictions",
    "write_report",
]
