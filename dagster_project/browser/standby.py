"""The server of `clip-select browse` beside `clip-select ui`: it loads when a page is first asked for.

Here: waiting. It ends when its standard input is closed, which is when the UI ends.
"""

import os
import select
import signal
import socket
import sys
import threading
from pathlib import Path


def main() -> None:
    """Serve the project whose YAML is the first argument, on the listening socket whose descriptor is the second."""
    config, descriptor = sys.argv[1:]
    listening = socket.socket(fileno=int(descriptor))
    readable, _, _ = select.select([0, listening.fileno()], [], [])
    if 0 in readable:
        return

    def end_with_the_ui() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_the_ui, daemon=True).start()
    from assets.settings import open_project
    from dagster_project.browser.app import application, run
    from dagster_project.browser.token import stored_token

    run(application(open_project(Path(config)), stored_token()), listening)


if __name__ == "__main__":
    main()
