"""The one exception for mistakes in what the user gave."""


class InputError(ValueError):
    """Bad input: its message is one sentence that names the thing and the remedy.

    `main` prints the sentence without a traceback and exits with code 2.
    """
