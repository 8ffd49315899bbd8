"""The page is there before torch is: what only adapting needs is not imported until somebody adapts."""

import json
import subprocess
import sys
from pathlib import Path

HEAVY = (
    "torch",
    "open_clip",
    "timm",
    "transformers",
    "peft",
    "matplotlib",
    "highdicom",
    "sklearn",
    "onnx",
    "onnxruntime",
)


def test_the_page_is_laid_out_without_torch():
    script = (
        "import json, sys, app; from fmclip.page.tower import TowerLoader; "
        f"app.build_page(TowerLoader('tiny', 'auto')); print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    )
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == []
