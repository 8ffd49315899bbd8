"""`python -m fmclip`."""

from fmclip.process import prepare_process

prepare_process()

from fmclip.cli import main

if __name__ == "__main__":
    main()
