"""What stands behind the page: visitors, uploads, example cases and charts, without a browser."""

import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fmclip.errors import FmclipError
from fmclip.page import charts, html, uploads
from fmclip.page.cases import list_cases
from fmclip.page.tower import TowerLoader
from fmclip.page.visitors import Visitors
from fmclip.scans import Scan
from fmclip.session import Finding, Progress, Session

EXAMPLES = Path(__file__).parent.parent / "examples"


def upload(cache: Path, folder: str, name: str, content: bytes) -> str:
    path = cache / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def picture(cache: Path, name: str, shape: tuple[int, int] = (20, 30)) -> str:
    path = Path(upload(cache, name, f"{name}.png", b""))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)).save(path)
    return str(path)


def new_session() -> Session:
    return Session("tiny", "cpu")


def test_uploads_are_read_and_then_gone_and_no_message_names_a_file(cache):
    paths = [picture(cache, "mueller"), upload(cache, "x", "meier.png", b"just text")]
    taken = uploads.take_scans(paths, 3, 10)
    assert [scan.label for scan in taken.scans] == ["scan 3"]
    assert str(taken.errors[0]).startswith("scan 4")
    assert "meier" not in str(taken.errors[0])
    assert not any(cache.rglob("*"))


def test_too_many_files_are_refused_unread_and_deleted(cache):
    taken = uploads.take_scans([picture(cache, f"p{place}") for place in range(4)], 1, 3)
    assert taken.scans == []
    assert taken.taken == 0
    assert "at most 3" in str(taken.errors[0])
    assert not any(cache.rglob("*"))


def test_files_outside_of_the_cache_are_never_deleted(cache, tmp_path):
    outside = tmp_path / "precious.png"
    outside.write_bytes(b"1")
    uploads.delete(outside)
    uploads.delete(cache / ".." / "precious.png")
    assert outside.exists()


def test_large_scans_are_shrunk_with_a_note_and_keep_their_proportions():
    scan = uploads.shrink(Scan(np.random.default_rng(0).random((2048, 512), dtype=np.float32)))
    assert (scan.height, scan.width) == (1024, 256)
    assert "512 x 2048" in scan.notes[0]


def test_download_names_cannot_be_guessed(cache):
    assert uploads.new_file(".safetensors") != uploads.new_file(".safetensors")


def test_every_visitor_gets_a_session_of_their_own():
    visitors = Visitors(new_session)
    assert visitors.get("a") is visitors.get("a")
    assert visitors.get("a").session is not visitors.get("b").session


def test_a_session_that_is_slow_to_make_or_to_close_keeps_nobody_else_waiting():
    making, closing, go_on = threading.Event(), threading.Event(), threading.Event()

    class Slow(Session):
        def close(self):
            closing.set()
            assert go_on.wait(timeout=20)

    def make() -> Session:
        if len(visitors) == 1:
            making.set()
            assert go_on.wait(timeout=20)
        return Slow("tiny", "cpu")

    visitors = Visitors(make, capacity=2)
    first = visitors.get("a")
    newcomer = threading.Thread(target=visitors.get, args=("b",))
    newcomer.start()
    assert making.wait(timeout=20)
    assert visitors.get("a") is first
    go_on.set()
    newcomer.join()
    go_on.clear()
    visitors.get("c")  # "b" has to go
    assert closing.wait(timeout=20)
    assert visitors.get("c") is visitors.get("c")
    go_on.set()


def test_a_tower_that_cannot_be_loaded_says_so_and_is_tried_again(monkeypatch):
    def fail(name, device):
        raise OSError("https://example.org/secret is not reachable")

    loader = TowerLoader("tiny", "cpu")
    with monkeypatch.context() as broken:
        broken.setattr("fmclip.towers.get_tower", fail)
        note = loader.describe()
    assert "cannot be used" in note
    assert "secret" not in note
    assert "Running on the CPU" in loader.describe()
    assert not loader.has_gpu


def test_the_longest_idle_visitor_leaves_when_the_page_is_full():
    visitors = Visitors(new_session, capacity=2)
    first, second = visitors.get("a"), visitors.get("b")
    visitors.get("a")
    visitors.get("c")
    assert len(visitors) == 2
    assert visitors.get("a") is first
    assert visitors.get("b") is not second


def test_idle_visitors_are_forgotten_after_a_while():
    visitors = Visitors(new_session, idle_seconds=-1)
    visitors.get("a")
    visitors.get("b")
    assert len(visitors) == 1


def test_a_page_full_of_busy_visitors_says_so(monkeypatch):
    monkeypatch.setattr(Session, "is_adapting", True)
    visitors = Visitors(new_session, capacity=1)
    visitors.get("a")
    with pytest.raises(FmclipError, match="full"):
        visitors.get("b")


def test_leaving_frees_the_place():
    visitors = Visitors(new_session, capacity=1)
    visitors.get("a")
    visitors.leave("a")
    visitors.leave("never came")
    assert len(visitors) == 0


def test_example_cases_can_be_loaded_and_every_query_has_its_truth():
    for case in list_cases(EXAMPLES):
        normals, queries = case.load()
        assert len(normals) >= 8
        assert len(queries) == len(case.truths)
        assert any(truth.startswith("simulated lesion: ") for truth in case.truths)


def test_without_examples_there_are_no_cases(tmp_path):
    assert list_cases(tmp_path) == []


def test_the_loss_chart_marks_where_a_stage_begins():
    curve = [("stage 2", 1.0), ("stage 2", 0.5), ("stage 3", 0.4), ("stage 3", 0.3)]
    chart = charts.loss_chart(curve)
    assert chart.count('class="fm-line"') == 2
    assert chart.count('class="fm-break"') == 1
    assert "now 0.30" in chart
    assert charts.loss_chart(curve[:1]) == ""


def finding(score: float) -> Finding:
    pixels = np.zeros((8, 8), np.float32)
    return Finding(
        label="scan <1>",
        scan=Scan(pixels, "scan <1>"),
        map=pixels,
        parts={},
        score=score,
        threshold=0.5,
        verdict="deviates" if score > 0.5 else "within the references",
        rank="higher than all 4 reference scans",
        is_abnormal=score > 0.5,
        reference_scores=(0.1, 0.2, 0.3, 0.4),
    )


def test_the_verdict_is_in_words_and_escaped():
    text = html.verdict(finding(0.7), 0.5, {}, 1, 3)
    assert "deviates from the references" in text
    assert "higher than all 4 reference scans" in text
    assert "<1>" not in text
    assert "set by hand" not in text


def test_a_threshold_set_by_hand_is_shown_beside_the_calibrated_answer():
    text = html.verdict(finding(0.7), 0.8, {"Known truth": "normal", "Window": ""}, 1, 3)
    assert "within the references" in text
    assert "set by hand" in text
    assert "deviates <small>at 0.50" in text
    assert "Known truth" in text
    assert "Window" not in text


def test_cards_come_worst_first():
    findings = [finding(0.2), finding(0.9), finding(0.6)]
    text = html.cards(findings, findings[1], 0.5, 0.5)
    assert [text.index(f'data-index="{place}"') for place in (1, 2, 0)] == sorted(
        text.index(f'data-index="{place}"') for place in range(3)
    )
    assert "2 of 3 scans deviate;" in text


def test_progress_of_unknown_length_shows_a_moving_bar():
    unknown = html.progress(Progress("patch memory", 0, 0, (), 1.0, None, "patch memory"))
    known = html.progress(Progress("stage 2", 5, 10, (), 1.0, 1.0, "stage 2"))
    assert "fm-unknown" in unknown
    assert 'aria-valuenow="50"' in known
