"""The MCP server, called as an agent calls it; needs `gradio[mcp]`."""

import asyncio
import base64
import importlib.util
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

import app
from fmclip.errors import FmclipError
from fmclip.page.linked_files import find_files
from fmclip.page.tower import TowerLoader

NORMALS = sorted((Path(__file__).parents[1] / "examples/brain_mri_t1/normal").glob("*.png"))[:4]
QUERY = Path(__file__).parents[1] / "examples/brain_mri_t1/query/query-06.png"


@pytest.fixture
def address(tmp_path, monkeypatch):
    """A page on the tiny tower that offers its endpoints to agents."""
    if importlib.util.find_spec("mcp") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("gradio[mcp] is not installed")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    page = app.build_page(TowerLoader("tiny", "cpu"))
    page.queue().launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, server_name="127.0.0.1", mcp_server=True)
    yield page.local_url
    page.close()


def upload(address: str, path: Path) -> str:
    """As gradio's own tool for agents does it: a link to the uploaded file."""
    with path.open("rb") as file:
        answer = httpx.post(f"{address}gradio_api/upload", files={"files": ("Mustermann.png", file)})
    return f"{address}gradio_api/file={answer.json()[0]}"


async def talk(address: str, agent) -> None:
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async with (
        streamablehttp_client(f"{address}gradio_api/mcp/") as (reading, writing, _),
        ClientSession(reading, writing) as session,
    ):
        await session.initialize()
        await agent(session)


def converse(address: str, agent) -> None:
    """In a thread of its own: browser tests leave playwright's event loop running in this one."""
    with ThreadPoolExecutor(1) as aside:
        aside.submit(asyncio.run, talk(address, agent)).result()


def test_an_agent_adapts_and_asks_twice_by_links(address, tmp_path):
    async def agent(session):
        tools = {tool.name: tool for tool in (await session.list_tools()).tools}
        assert set(tools) == {"adapt", "predict"}
        assert "Research use only" in tools["adapt"].description
        normals = [upload(address, path) for path in NORMALS[:2]]
        normals += ["data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() for path in NORMALS[2:]]
        learned = await session.call_tool("adapt", {"normals": normals, "method": "patch_memory"})
        told = " ".join(part.text for part in learned.content)
        assert not learned.isError, told
        assert "'references': 4" in told
        (adapter,) = set(re.findall(r"http[^' ]+\.safetensors", told))
        scores = []
        for _ in range(2):  # the adapter stays for the next question, the scans do not
            found = await session.call_tool("predict", {"adapter": adapter, "scans": [upload(address, QUERY)]})
            told = " ".join(part.text for part in found.content)
            assert not found.isError, told
            assert re.search(r"http[^' ]+\.png", told)
            scores.append(re.findall(r"'score': ([\d.]+)", told))
        assert len(scores[0]) == 1
        assert scores[0] == scores[1]

    converse(address, agent)
    assert not list((tmp_path / "cache").rglob("*Mustermann*"))


def test_what_is_no_link_to_this_page_is_refused_in_words(address):
    async def agent(session):
        for given in ("/etc/passwd", "https://example.org/scan.png", f"{address}gradio_api/file=/etc/passwd"):
            answer = await session.call_tool("adapt", {"normals": [given, given], "method": "patch_memory"})
            assert answer.isError
            assert "upload it, then give its link" in answer.content[0].text
            assert "passwd" not in answer.content[0].text

    converse(address, agent)


def test_only_files_of_the_cache_are_found_and_a_refusal_deletes_the_others(cache):
    cache.mkdir()

    def uploaded() -> Path:
        file = cache / "a" / "a.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(NORMALS[0].read_bytes())
        return file

    link = "http://any.where/gradio_api/file={}"
    for given in (str(uploaded()), {"path": str(uploaded())}, link.format(uploaded())):
        assert find_files([given]) == [str(uploaded())]
    assert find_files(None) == []
    kept = find_files([link.format(uploaded())], keep=True)
    assert kept != [str(uploaded())]
    assert Path(kept[0]).read_bytes() == NORMALS[0].read_bytes()
    for bad in (
        "/etc/passwd",
        {"path": f"{cache}/../../etc/passwd"},
        link.format("/etc/passwd"),
        "x" * 5000,
        {},
        7,
        "",
    ):
        with pytest.raises(FmclipError, match="upload it"):
            find_files([str(uploaded()), bad])
        assert not (cache / "a" / "a.png").exists()
    with pytest.raises(FmclipError, match="base64"):
        find_files(["data:image/png;base64,A"])
