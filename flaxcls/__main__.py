"""The commands `flaxcls` and `python -m flaxcls`."""

import importlib

from flaxcls import interrupt


def run() -> None:
    """Runs the command of `sys.argv` and exits."""
    interrupt.listen()  # before JAX is imported, which takes seconds
    importlib.import_module("flaxcls.main").run()


if __name__ == "__main__":
    run()
