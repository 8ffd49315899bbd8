"""`python -m fmclip`."""

from fmclip.cli import main

if __name__ == "__main__":
    main()
