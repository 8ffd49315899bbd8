"""`python -m fmclip`."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read by torch: threads that spin stall each other on busy cores

from fmclip.cli import main

if __name__ == "__main__":
    main()
