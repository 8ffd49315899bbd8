"""What is measured, one command each; every process is prepared as the program's own are."""

from fmclip.process import prepare_process

prepare_process()
