"""Take the pictures of `clip-select browse` in the README and in docs/browse.md, from a finished demo.

    python -m examples.demo.browse_tour docs/images/browse [CONFIG]

Here: which views, and their size. Needs playwright and Debian's chromium.
"""

import io
import shutil
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image

from assets.settings import open_project
from dagster_project.browser.app import application
from dagster_project.location import DEMO_CONFIG

RECIPE = "neg_clip_loss_30_norm_sim_20"
TOKEN = "of-the-tour-which-ends-with-this-process"
WIDTH, HEIGHT, TALL, COLOURS = 1440, 900, 1250, 128


def serve(config: Path) -> tuple[uvicorn.Server, threading.Thread, str]:
    """Serve a project on a free port of 127.0.0.1; return the server, its thread and its address."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(application(open_project(config), TOKEN), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    return server, thread, f"http://127.0.0.1:{listening.getsockname()[1]}"


def keep(page: Any, path: Path) -> None:
    """Keep a picture of the page in few colours, so that it is small."""
    page.wait_for_load_state("networkidle")
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def take(page: Any, folder: Path) -> None:
    """Take the pictures of the grid, a sample and a threshold that is moved."""
    page.goto(f"/?recipe={RECIPE}&sort=norm_sim_inf/tiny/festive&show=clip_score/tiny")
    page.locator(".tile img").nth(6).wait_for()
    keep(page, folder / "grid.png")
    page.locator(".tile").nth(2).click()
    page.get_by_role("heading", name="Lineage").wait_for()
    keep(page, folder / "sample.png")
    page.set_viewport_size({"width": WIDTH, "height": TALL})
    page.goto(f"/what-if?recipe={RECIPE}&limit2=fraction:0.12")
    page.locator("#leave .tile").first.wait_for()
    keep(page, folder / "what-if.png")


def main(folder: Path, config: Path = DEMO_CONFIG) -> None:
    """Write the pictures into a folder."""
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    server, thread, address = serve(config)
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT}, base_url=address)
        page.goto(f"/?token={TOKEN}")
        take(page, folder)
        chromium.close()
    server.should_exit = True
    thread.join()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
