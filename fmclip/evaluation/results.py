"""What an evaluation writes: JSON, Markdown and figures."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fmclip.evaluation import plots
from fmclip.evaluation.environment import environment
from fmclip.evaluation.rows import Run, Skipped
from fmclip.evaluation.tables import markdown, side_by_side, skipped_lines


@dataclass
class Results:
    """Collects runs and keeps the files up to date.

    Attributes:
        json_file: Gets {"rows": [...], "environment": {...}}, and "skipped" if anything was; None for none.
        table: Gets the tables as Markdown; None for none.
        figures: Folder of the figures; None for none.
        runs: What was measured.
        skipped: What was not.
    """

    json_file: Path | None = None
    table: Path | None = None
    figures: Path | None = None
    runs: list[Run] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def add(self, result: Run | Skipped) -> None:
        """Take one result; write JSON anew, and the heatmaps if the run brings examples.

        Raises:
            OSError: It cannot be written.
        """
        if isinstance(result, Skipped):
            self.skipped.append(result)
        else:
            if self.figures is not None and result.examples:
                plots.save_examples(self.figures, result)
            self.runs.append(replace(result, examples=()))  # a long evaluation would not hold all their scans
        if self.json_file is not None and self.runs:
            content: dict[str, Any] = {
                "rows": [asdict(run.row) for run in self.runs],
                **({"skipped": [asdict(skipped) for skipped in self.skipped]} if self.skipped else {}),
                "environment": environment(),
            }
            _write(self.json_file, json.dumps(content, indent=1) + "\n")

    def draw(self) -> None:
        """Write table and figures.

        Raises:
            OSError: One cannot be written.
        """
        if self.table is not None:
            where = environment()
            machine = f"{where['gpu'] or where['cpu'] or where['machine']}, {where['cpu_count']} cores"
            code = f"fmclip {where['fmclip']} ({where['commit'] or where['code']}), torch {where['torch']}"
            head = (
                "# Evaluation\n\nIn percent; mean ± standard deviation over the seeds; 95 % interval of the mean image "
                "AUROC by bootstrap over scans; sensitivity, specificity, F1 and Dice at the calibrated threshold, "
                f"which no test label went into.\n\n{where['date']}, {machine}, {code}.\n\n"
            )
            _write(self.table, head + markdown(self.runs, self.skipped))
        if self.figures is not None:
            groups: dict[tuple, list[Run]] = {}
            for run in self.runs:
                row = run.row
                groups.setdefault((row.dataset, row.tower, row.half, row.method, row.k, row.abnormal_k), []).append(run)
            for own in groups.values():
                plots.save_curves(self.figures, own)
            for compared in side_by_side(self.runs):
                plots.save_comparison(self.figures, compared)

    def notes(self) -> list[str]:
        """Say what was skipped and left out, with counts and without names."""
        rows = [run.row for run in self.runs]
        lines = skipped_lines(self.skipped)
        for dataset in dict.fromkeys(row.dataset for row in rows):
            own = [row for row in rows if row.dataset == dataset]
            unreadable, twins = max(row.n_unreadable for row in own), max(row.n_twins for row in own)
            if unreadable:
                lines.append(f"{dataset}: {unreadable} scans cannot be read and were left out.")
            if masks := max(row.n_unreadable_masks for row in own):
                lines.append(f"{dataset}: the masks of {masks} scans cannot be read and were left out.")
            if twins:
                why = "copies of scans that were learned from, or of their group"
                lines.append(f"{dataset}: up to {twins} test scans were left out, as {why}.")
        folder = self.figures
        if folder is not None and not all(plots.examples_file(folder, row).is_file() for row in rows):
            lines.append("Some runs that were resumed have no heatmaps: they were measured before figures were drawn.")
        return lines


def _write(path: Path, text: str) -> None:
    """Replace a file at once, so that a reader never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
