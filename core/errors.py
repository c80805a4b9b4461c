"""The base class of errors that a user can fix."""


class UserError(Exception):
    """Input, settings or a machine need a user's attention.

    The message names the file or field and the remedy. The command line prints it without a traceback, and sensors
    skip their tick with it.

    Attributes:
        exit_status: of a command that it ends.
    """

    exit_status = 2
