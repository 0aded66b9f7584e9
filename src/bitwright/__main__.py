"""``python -m bitwright``."""

from bitwright.cli.main import run

if __name__ == "__main__":
    run()
