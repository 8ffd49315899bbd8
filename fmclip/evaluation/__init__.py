"""Measure detectors on folders of scans with known answers.

datasets   a folder with a manifest, or NAME/normal, NAME/abnormal, NAME/masks -> Dataset
protocol   which scans are references and which are tested
metrics    image and pixel AUROC
runner     fit and test each combination -> Row
tables     rows -> mean and spread, Markdown
"""

from fmclip.evaluation.datasets import Case, Dataset, DatasetError, load_datasets
from fmclip.evaluation.metrics import PixelAUROC, image_auroc
from fmclip.evaluation.protocol import Half, Protocol, Split, split_cases
from fmclip.evaluation.runner import Plan, Row, environment, run_plan
from fmclip.evaluation.tables import Summary, summarise, to_markdown

__all__ = [
    "Case",
    "Dataset",
    "DatasetError",
    "Half",
    "PixelAUROC",
    "Plan",
    "Protocol",
    "Row",
    "Split",
    "Summary",
    "environment",
    "image_auroc",
    "load_datasets",
    "run_plan",
    "split_cases",
    "summarise",
    "to_markdown",
]
