"""What outlives a reload of the page, what is deleted, and the adapter's name and the Hub."""

import json
import logging
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from page_scans import CPU, ME, PLAIN, pictures, shown

from fmclip.checkpoint import describe_adapter, plain_name
from fmclip.errors import CheckpointError, FmclipError
from fmclip.hub import pull_adapter, push_adapter
from fmclip.page import uploads
from fmclip.page.handlers import Handlers
from fmclip.page.keeping import Keeping
from fmclip.page.teaching import Teaching
from fmclip.page.visitors import Visitors
from fmclip.session import Session

TOKEN = "hf_verysecret"


@pytest.fixture
def page(visitors, cache) -> Handlers:
    return Handlers(visitors, [], CPU)


@pytest.fixture
def keeping(page) -> Keeping:
    return Keeping(page)


def adapted(page, keeping, cache) -> dict:
    """A visitor with references, an adapter and a query; what the tab keeps."""
    told = shown(keeping.welcome("", ME))
    Teaching(page).choose_method("patch_memory", ME)
    page.add_references(pictures(cache, 1, 2, 3, 4), *PLAIN, ME)
    shown(page.adapt("brain MRI", "fast", ME))
    shown(page.add_queries(pictures(cache, 9), *PLAIN, ME))
    return told


def test_a_reload_finds_scans_adapter_and_answers_again(page, keeping, visitors, cache):
    key = adapted(page, keeping, cache)["key"]
    before = visitors.get(ME).findings[0].score
    page_after = shown(keeping.welcome(key, "reloaded"))
    assert page_after["references"].count("fm-pick") == 4
    assert page_after["cards"].count('class="fm-card"') == 1
    assert "adapter of 4 reference scans" in page_after["status"]
    assert page_after["download"]["interactive"] is True
    assert page_after["scan_type"] == "brain MRI"
    assert visitors.get("reloaded").findings[0].score == before
    assert shown(page.arrive("reloaded"))["method"]["value"] == "patch_memory"
    visitors.leave(ME)  # the old page is missed only now
    assert visitors.get("reloaded").references


def test_a_page_that_was_closed_first_is_found_again_too_but_only_with_its_key(page, keeping, visitors, cache):
    key = adapted(page, keeping, cache)["key"]
    visitors.leave(ME)
    assert "references" not in shown(keeping.welcome("", "stranger"))
    assert "references" not in shown(keeping.welcome("guessed ü", "another"))
    assert shown(keeping.welcome(key, "back"))["references"].count("fm-pick") == 4


def test_keys_are_long_and_all_different(keeping):
    keys = {shown(keeping.welcome("", f"visitor {place}"))["key"] for place in range(20)}
    assert len(keys) == 20
    assert all(len(key) >= 40 for key in keys)


def test_who_does_not_come_back_is_forgotten_after_an_hour(cache):
    visitors = Visitors(lambda: Session("tiny", "cpu"), idle_seconds=-1)
    visitor, _ = visitors.welcome(ME, "")
    visitors.leave(ME)
    visitors.forget_idle()
    assert len(visitors) == 0
    assert visitors.welcome("back", visitor.key)[1] is False


def test_those_who_left_make_room_before_those_who_are_there():
    visitors = Visitors(lambda: Session("tiny", "cpu"), capacity=2)
    here, _ = visitors.welcome("here", "")
    visitors.welcome("gone", "")
    visitors.leave("gone")
    visitors.get("new")
    assert visitors.get("here") is here


def test_a_reload_in_the_middle_of_a_training_stops_it_and_leaves_it_to_be_resumed(
    page, keeping, visitors, cache, monkeypatch
):
    from fmclip.detectors import fusionmedclip

    settings = {"stage2_epochs": 4000, "stage3_epochs": 0, "pool_size": 16, "batch_size": 4}
    monkeypatch.setitem(fusionmedclip.PRESETS, "fast", settings)
    key = shown(keeping.welcome("", ME))["key"]
    page.add_references(pictures(cache, 1, 2, 3, 4), *PLAIN, ME)
    training = threading.Event()

    def adapt() -> None:
        for update in page.adapt("brain MRI", "fast", ME):
            if "Stage 2" in str(update.get("status")) and ", step" in str(update.get("status")):
                training.set()

    thread = threading.Thread(target=adapt)
    thread.start()
    assert training.wait(timeout=60)
    after = shown(keeping.welcome(key, "reloaded"))
    thread.join(timeout=20)
    assert "The training was stopped" in after["status"]
    assert after["go_on"]["value"] == "Resume"
    assert after["go_on"]["visible"] is True


def test_everything_is_deleted_at_once_when_asked(page, keeping, visitors, cache):
    key = adapted(page, keeping, cache)["key"]
    download = Path(visitors.get(ME).download)
    former = visitors.get(ME)
    after = shown(keeping.forget(ME))
    assert after["references"] == ""
    assert after["slider"]["value"] is None
    assert after["normal_editor"] == {**after["normal_editor"], "value": None, "visible": False}
    assert all(after[part] == "" for part in ("why_note", "normal_note", "export_note", "hub_note", "cards", "verdict"))
    assert after["method"]["value"] == visitors.get(ME).method == "fusionmedclip"
    with pytest.raises(FmclipError, match="Nothing was learned"):
        page.offer_download(former)
    late = uploads.new_file(".pdf")
    with former.writing(late):
        late.write_bytes(b"late")
    assert not list(cache.rglob("*.pdf")) + list(cache.rglob("*.safetensors"))
    assert not download.exists()
    assert visitors.get(ME).references == []
    assert after["key"] != key
    assert visitors.welcome("back", key)[1] is False


def test_leaving_the_name_as_it_is_writes_no_new_file(page, keeping, visitors, cache):
    adapted(page, keeping, cache)
    before = visitors.get(ME).download
    assert "download" not in shown(keeping.name_adapter("", ME))
    assert visitors.get(ME).download == before


def test_an_adapter_keeps_its_name_and_no_name_can_be_a_path(page, keeping, visitors, cache, tmp_path):
    adapted(page, keeping, cache)
    after = shown(keeping.name_adapter("../Brain T1 <b>axial</b>", ME))
    assert after["adapter_name"] == "Brain T1 b axial b"
    file = Path(after["download"]["value"])
    assert file.name.startswith("fmclip-Brain-T1-b-axial-b-")
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(file.read_bytes())
    assert "Adapter Brain T1 b axial b loaded" in shown(page.load_adapter(str(copy), "other"))["status"]
    assert plain_name("é/..\\x" * 30) == plain_name(plain_name("é/..\\x" * 30))


class FakeHub:
    """A Hub of one process."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.calls: list[dict] = []

    def create_repo(self, repository, **options):
        self.calls.append(options)
        return f"https://huggingface.co/{repository}"

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, token):
        assert token == TOKEN
        self.files[f"{repo_id}/{path_in_repo}"] = path_or_fileobj

    def get_paths_info(self, repository, paths, token):
        there = [self.files.get(f"{repository}/{path}") for path in paths]
        return [SimpleNamespace(size=len(content)) for content in there if content is not None]

    def hf_hub_download(self, repository, name, token, local_dir):
        path = Path(local_dir) / name
        path.write_bytes(self.files[f"{repository}/{name}"])
        return str(path)


@pytest.fixture
def adapter(tmp_path, page, keeping, visitors, cache) -> Path:
    adapted(page, keeping, cache)
    path = tmp_path / "mine.safetensors"
    visitors.get(ME).session.save(path, "my brains")
    return path


def test_an_adapter_goes_to_the_hub_with_a_card_and_comes_back_the_same(adapter, tmp_path):
    hub = FakeHub()
    assert push_adapter(adapter, " me/brains ", TOKEN, api=hub).endswith("me/brains")
    assert hub.calls[0]["private"] is True
    card = hub.files["me/brains/README.md"].decode()
    assert "# my brains" in card
    assert "4 **normal** reference scans" in card
    assert "Not a medical device" in card
    pull_adapter(tmp_path / "back.safetensors", "me/brains", api=hub)
    assert (tmp_path / "back.safetensors").read_bytes() == adapter.read_bytes()
    assert TOKEN not in str(hub.files)


@pytest.mark.parametrize("name", ["", "noowner", "a/b/c", "../x", "me/br ains", "me/..", "https://hf.co/me/x"])
def test_names_that_are_no_repository_are_refused(adapter, tmp_path, name):
    with pytest.raises(FmclipError, match="owner/name"):
        push_adapter(adapter, name, TOKEN, api=FakeHub())
    with pytest.raises(FmclipError, match="owner/name"):
        pull_adapter(tmp_path / "x", name, api=FakeHub())


def test_what_is_no_adapter_is_not_pushed_and_what_is_too_large_not_pulled(adapter, tmp_path):
    hub = FakeHub()
    (tmp_path / "x").write_bytes(b"not an adapter")
    with pytest.raises(CheckpointError):
        push_adapter(tmp_path / "x", "me/brains", TOKEN, api=hub)
    assert hub.files == {}
    with pytest.raises(FmclipError, match=r"holds no adapter\.safetensors"):
        pull_adapter(tmp_path / "y", "me/other", api=hub)
    hub.get_paths_info = lambda *_, **__: [SimpleNamespace(size=2**40)]
    with pytest.raises(FmclipError, match="larger than any adapter"):
        pull_adapter(tmp_path / "y", "me/other", api=hub)


def test_the_hubs_own_errors_and_the_token_are_never_told(page, keeping, visitors, cache, monkeypatch, caplog):
    adapted(page, keeping, cache)

    class Angry(FakeHub):
        def create_repo(self, repository, **options):
            error = OSError(f"401 for token {TOKEN}")
            error.response = SimpleNamespace(status_code=401)
            raise error

    monkeypatch.setattr("fmclip.hub._hub", Angry)
    with caplog.at_level(logging.DEBUG):
        after = shown(keeping.push("me/brains", TOKEN, True, ME))
    assert "it answered 401" in after["hub_note"]
    assert TOKEN not in json.dumps({name: str(value) for name, value in after.items()}) + caplog.text
    assert TOKEN not in str(vars(visitors.get(ME)))

    assert "Pushing needs a token" in shown(keeping.push("me/brains", "", True, ME))["hub_note"]


def test_a_host_that_keeps_off_the_hub_says_so(adapter, tmp_path):
    with pytest.raises(FmclipError, match="keeps off the Hugging Face Hub"):  # the tests run so
        push_adapter(adapter, "me/brains", TOKEN)
    with pytest.raises(FmclipError, match="use Download and Load"):
        pull_adapter(tmp_path / "back.safetensors", "me/brains")


def test_the_page_pushes_and_pulls_and_wipes_the_token(page, keeping, visitors, cache, monkeypatch):
    adapted(page, keeping, cache)
    hub = FakeHub()
    monkeypatch.setattr("fmclip.hub._hub", lambda: hub)
    after = shown(keeping.push("me/brains", TOKEN, True, ME))
    assert "Pushed to me/brains" in after["hub_note"]
    assert after["hub_token"] == ""
    after = shown(keeping.pull("me/brains", "", "other"))
    assert "learned from 4 reference scans" in after["status"]
    assert visitors.get("other").session.is_adapted
    assert not [
        file
        for file in cache.rglob("*.safetensors")
        if str(file) not in {visitors.get(ME).download, visitors.get("other").download}
    ]


def test_an_adapter_describes_itself(adapter):
    facts = describe_adapter(adapter)
    assert (facts["name"], facts["method"], facts["references"]) == ("my brains", "patch_memory", 4)
