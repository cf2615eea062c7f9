"""`python -m vtc` is the command `vtc`."""

from vtc.cli.main import main

if __name__ == "__main__":
    main()
