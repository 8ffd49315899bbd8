"""Imports point one way (DESIGN: scans at the bottom, the page on top); files stay one idea long."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
ORDER = [
    {"errors"},
    {
        "acceleration",
        "scans",
        "colours",
        "devices",
        "losses",
        "background",
        "pace",
        "process",
        "search",
        "whitening",
        "prediction_interval",
        "patch_grid",
    },
    {"progress"},
    {"synthesis", "towers"},
    {"prompts", "adapters", "maps", "views"},
    {"memory"},
    {"calibration", "mask_files"},
    {"detectors"},
    {"checkpoint", "checks", "figures", "self_check", "explain", "explanation_figure", "regions"},
    {"abnormal_scans", "findings", "job", "learning", "hub", "settings", "shortage"},
    {"in_use"},
    {"session", "evaluation"},
    {"report", "contrastive", "export"},
    {"archive"},
    {"page", "cli", "archive_cli", "evaluation_cli", "export_cli", "replay_cli", "pretraining_cli", "__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "fmclip" else [f"fmclip.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("fmclip.")}
    return rooms


def modules() -> list[Path]:
    return sorted((ROOT / "fmclip").rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "fmclip").parts[0].removesuffix(".py")


def test_imports_point_downwards():
    wrong = [
        f"{path.relative_to(ROOT)} imports {other}"
        for path in modules()
        if (room := room_of(path)) in RANK
        for other in imported_rooms(path) - {room, "__version__"}
        if RANK[other] > RANK[room]
    ]
    assert not wrong


def test_the_core_does_not_know_gradio():
    for path in modules():
        if room_of(path) not in {"page"}:
            assert "gradio" not in {
                name.name.split(".")[0]
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Import)
                for name in node.names
            }, path


def test_modules_stay_below_400_lines():
    long = {str(path): count for path in modules() if (count := len(path.read_text().splitlines())) > 400}
    assert not long
