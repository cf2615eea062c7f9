"""`python -m vtc.eval.tiny`."""

from vtc.eval.tiny.cli import app

if __name__ == "__main__":
    app(prog_name="python -m vtc.eval.tiny")
