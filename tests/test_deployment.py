"""What a host gets: the image of the Dockerfile, without a container, and room for all visitors."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import app
from fmclip.page.tower import TowerLoader
from fmclip.page.visitors import MAX_VISITORS

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
SECONDS = 120


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name} (.*)$", DOCKERFILE, re.MULTILINE)


def test_what_the_image_holds_is_enough_to_serve_the_page_from_a_folder_that_nobody_can_write_to(tmp_path):
    image = tmp_path / "app"
    image.mkdir()
    for line in instructions("COPY"):
        *sources, target = shlex.split(line)
        for source in sources:
            goal = image / target if len(sources) == 1 and target != "." else image / source
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, goal, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, goal)
    for path in (image, *image.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(image.rglob("*"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = dict(pair.split("=", 1) for line in instructions("ENV") for pair in line.split())
    settings = {name: value.replace("/tmp", str(tmp_path / "tmp")) for name, value in settings.items()}
    settings |= {"GRADIO_SERVER_PORT": str(port), "FMCLIP_TOWER": "tiny", "HOME": "/home/nobody"}
    environment = {"PATH": os.environ["PATH"], **settings}
    (check,) = re.findall(r'HEALTHCHECK .*CMD \["python", "-c", "(.*)"\]', DOCKERFILE)
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=image, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        pause = threading.Event()
        for _ in range(SECONDS):
            assert process.poll() is None, process.stdout.read().decode()
            probe = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, check=False)
            if probe.returncode == 0:
                break
            pause.wait(0.5)
        assert probe.returncode == 0, probe.stderr.decode()
    finally:
        process.terminate()
        process.wait(timeout=30)
        for path in (image, *image.rglob("*")):
            path.chmod(0o755)
    assert sorted(image.rglob("*")) == before


def test_no_training_waits_in_a_line_that_shows_no_place():
    page = app.build_page(TowerLoader("tiny", "cpu"))
    limits = [one.concurrency_limit for one in page.fns.values() if one.concurrency_id == "tower"]
    assert len(limits) == 4
    assert min(limits) >= MAX_VISITORS
