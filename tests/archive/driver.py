"""A run in a process of its own, to be killed: `driver.py ADDRESS ADAPTER MANIFEST OUT`; tells finished parts."""

import sys
from pathlib import Path

from fmclip.archive.cluster import Workers
from fmclip.archive.manifest import Columns, Source
from fmclip.archive.run import score_archive

if __name__ == "__main__":
    address, adapter, manifest, out = sys.argv[1:]
    score_archive(
        Path(adapter),
        Source(Path(manifest), Columns()),
        Path(out),
        workers=Workers(count=1, address=address),
        part_size=2,
        on_progress=lambda progress: print(progress.parts_done, flush=True),
    )
