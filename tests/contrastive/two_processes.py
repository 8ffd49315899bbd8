"""Run by the test of two processes: trains in each and writes what came of it."""

import json
import sys
from pathlib import Path

import torch

from fmclip.contrastive.config import config_from
from fmclip.contrastive.runs import pretrain


def main() -> None:
    """Train as the JSON settings say; the losses go to the file named second."""
    torch.set_num_threads(1)
    config = config_from(json.loads(Path(sys.argv[1]).read_text()))
    losses: list[float] = []
    pretrain(config, device="cpu", on_event=lambda event: losses.append(event.loss))
    if losses:  # only the first process is told
        Path(sys.argv[2]).write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
