"""The rows of Table 8: each is measured under its own name, or refused with the reason."""

from dataclasses import dataclass
from types import SimpleNamespace

from benchmarks import ablation
from fmclip.detectors import DETECTORS
from fmclip.evaluation import Run, Skipped


def test_each_row_has_a_preset_and_trains_what_its_number_says():
    config = DETECTORS[ablation.METHOD].config_class
    assert [config.preset(preset).row for preset in ablation.ADDS] == [1, 2, 3, 4, 5, 6]


@dataclass
class FakeRow:
    """A row of which only the method matters."""

    method: str


def test_rows_are_told_apart_and_our_default_stands_beside(monkeypatch):
    asked = []

    def run_plan(plan, tower, journal):
        asked.append((plan.methods[0], plan.preset))
        if plan.preset in ("row1", "row2"):
            yield Skipped("set", plan.methods[0], "mini", 4, 0, "no words")
        else:
            yield Run(FakeRow(plan.methods[0]), ())

    monkeypatch.setattr(ablation, "run_plan", run_plan)
    found = list(ablation.measure([], None, SimpleNamespace(k=4, seeds=1), None))
    names = [(one if isinstance(one, Skipped) else one.row).method for one in found]
    assert [name[:5] for name in names[:6]] == [f"row {row}" for row in range(1, 7)]
    assert names[6] == "fusionmedclip"
    assert asked[-1] == ("fusionmedclip", "full")
