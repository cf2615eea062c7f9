"""`python -m vtc` is the command `vtc`."""

from vtc.cli import main

main()
