"""Measure detectors on folders of scans with known answers.

datasets     a folder of scans -> Dataset       layouts    how people lay such folders out
chexpert     CheXpert's tables
looks        all scans are looked at: copies that nobody named, within a set and across two
twins        scans that are almost one picture share a name
protocol     which scans are references and which are tested
metrics      scores and answers -> AUROC, ...   pixels     maps and masks -> AUROC, AUPRO, Dice
intervals    bootstrap intervals and paired tests
runner       fit and test each combination -> Run
rows         what a run yields, and the file to resume from
results      what an evaluation writes: JSON, Markdown, figures
tables       runs -> mean and spread, Markdown  plots      histograms, ROC, heatmap grids
environment  machine and versions
"""

from fmclip.evaluation.datasets import Case, Dataset, DatasetError, load_datasets
from fmclip.evaluation.environment import environment
from fmclip.evaluation.protocol import Half, Protocol, Split, split_cases
from fmclip.evaluation.results import Results
from fmclip.evaluation.rows import Journal, Row, Run, Skipped
from fmclip.evaluation.runner import Plan, run_plan
from fmclip.evaluation.tables import Summary, summarise

__all__ = [
    "Case",
    "Dataset",
    "DatasetError",
    "Half",
    "Journal",
    "Plan",
    "Protocol",
    "Results",
    "Row",
    "Run",
    "Skipped",
    "Split",
    "Summary",
    "environment",
    "load_datasets",
    "run_plan",
    "split_cases",
    "summarise",
]
