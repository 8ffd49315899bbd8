"""Stop and go on, more steps, the synthetic self-check and the estimate of time: in the core and on the page."""

import numpy as np
import pytest
import torch
from detectors.detector_scans import normal_scan
from page_scans import CPU, ME, PLAIN, event, pictures, shown

from fmclip import self_check
from fmclip.detectors import FusionMedCLIP, FusionMedCLIPConfig, PatchMemory, Step, Training, fusionmedclip
from fmclip.detectors.training import STAGE2, STAGE3
from fmclip.errors import FmclipError, Stopped
from fmclip.job import Job
from fmclip.learning import estimate_seconds
from fmclip.pace import PACES, Paces
from fmclip.page import uploads
from fmclip.page.handlers import Handlers
from fmclip.page.teaching import Teaching
from fmclip.page.visitors import Visitors
from fmclip.regions import NormalRegion
from fmclip.report import RunRecord
from fmclip.report.record import RESUMED
from fmclip.session import Progress, Session

CONFIG = FusionMedCLIPConfig(stage2_epochs=6, stage3_epochs=0, pool_size=16, batch_size=4, block_dropout=0.0)


class Listener:
    """Hears a fit; stops it at a step."""

    def __init__(self, stage: str = "", step: int = 0) -> None:
        self.stage, self.step = stage, step
        self.training: Training | None = None

    def __call__(self, event) -> None:
        if isinstance(event, Training):
            self.training = event
        if isinstance(event, Step) and (event.stage, event.step) == (self.stage, self.step):
            raise Stopped


def same(one: FusionMedCLIP, other: FusionMedCLIP) -> bool:
    state, others = one.state(), other.state()
    return state.keys() == others.keys() and all(torch.equal(state[name], others[name]) for name in state)


def test_a_stopped_training_goes_on_to_what_it_would_have_become(tiny_tower):
    normals = [normal_scan(seed) for seed in range(4)]
    whole = FusionMedCLIP(tiny_tower, CONFIG).fit(normals)
    listener = Listener(STAGE2, 3)
    stopped = FusionMedCLIP(tiny_tower, CONFIG).fit(normals, on_event=listener)
    assert stopped.network_ is None
    assert (listener.training.step, listener.training.steps) == (3, 6)
    assert not listener.training.is_over
    resumed = FusionMedCLIP(tiny_tower, CONFIG).resume(normals, listener.training)
    assert same(resumed, whole)
    assert resumed.reference_scores_ == whole.reference_scores_
    assert RunRecord.of(resumed, resumed.calibration(), ()).not_repeatable == ""


def test_more_steps_are_those_of_a_longer_training(tiny_tower):
    normals, listener = [normal_scan(seed) for seed in range(4)], Listener()
    FusionMedCLIP(tiny_tower, CONFIG).fit(normals, on_event=listener)
    assert listener.training.is_over
    longer = CONFIG.longer(2)
    assert same(
        FusionMedCLIP(tiny_tower, longer).resume(normals, listener.training),
        FusionMedCLIP(tiny_tower, longer).fit(normals),
    )


def test_stage_3_goes_on_from_where_it_stood(tiny_tower):
    config = FusionMedCLIPConfig(stage2_epochs=2, stage3_epochs=4, pool_size=16, batch_size=4)
    normals, listener = [normal_scan(seed) for seed in range(4)], Listener(STAGE3, 2)
    FusionMedCLIP(tiny_tower, config).fit(normals, on_event=listener)
    assert listener.training.stage == STAGE3
    resumed = FusionMedCLIP(tiny_tower, config).resume(normals, listener.training)
    assert any(name.startswith("lora.") for name in resumed.state())
    whole = FusionMedCLIP(tiny_tower, config).fit(normals)
    copy = FusionMedCLIP(tiny_tower, config)
    copy.reference_scores_ = resumed.reference_scores_
    copy.load_state(resumed.state())
    said = [RunRecord.of(one, one.calibration(), ()).not_repeatable for one in (whole, resumed, copy)]
    assert said == ["", RESUMED, RESUMED]
    for one, other in zip(resumed.predict(normals), whole.predict(normals), strict=True):
        np.testing.assert_allclose(one.map, other.map, atol=2e-3)


def test_a_stage_3_that_went_on_after_a_shortage_says_so(tiny_tower, monkeypatch):
    config = FusionMedCLIPConfig(stage2_epochs=2, stage3_epochs=4, pool_size=16, batch_size=4)
    normals, listener = [normal_scan(seed) for seed in range(4)], Listener(STAGE3, 2)
    FusionMedCLIP(tiny_tower, config).fit(normals, on_event=listener)
    trained, calls = fusionmedclip.train_stage3, []

    def short(*given):
        calls.append(given)
        if len(calls) == 1:
            given[7](listener.training)  # was kept before the memory ran out
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return trained(*given)

    monkeypatch.setattr(fusionmedclip, "train_stage3", short)
    detector = FusionMedCLIP(tiny_tower, config).fit(normals)
    assert len(calls) == 2
    assert RunRecord.of(detector, detector.calibration(), ()).not_repeatable == RESUMED


def test_a_stage_3_that_cannot_be_resumed_leaves_the_adapter_from_before(monkeypatch):
    preset = {"stage2_epochs": 2, "stage3_epochs": 2, "pool_size": 8, "batch_size": 4}
    monkeypatch.setitem(fusionmedclip.PRESETS, "fast", preset)
    session, query = Session("tiny", "cpu"), normal_scan(9)
    list(session.adapt([normal_scan(seed) for seed in range(4)], preset="fast"))
    key, before = session.adapter_key, session.query([query])[0].map

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    with monkeypatch.context() as short:
        short.setattr(fusionmedclip, "train_stage3", full)
        with pytest.raises(FmclipError, match="nothing was resumed"):
            list(session.go_on())
    assert session.adapter_key == key
    np.testing.assert_array_equal(session.query([query])[0].map, before)
    assert list(session.go_on())[-1].stage == "stage 3"  # with memory again it goes on


def test_the_state_of_a_training_survives_its_way_to_another_process(tiny_tower):
    import pickle

    normals, listener = [normal_scan(seed) for seed in range(4)], Listener(STAGE2, 3)
    FusionMedCLIP(tiny_tower, CONFIG).fit(normals, on_event=listener)
    copy = pickle.loads(pickle.dumps(listener.training))
    assert same(
        FusionMedCLIP(tiny_tower, CONFIG).resume(normals, copy),
        FusionMedCLIP(tiny_tower, CONFIG).resume(normals, listener.training),
    )


def test_held_out_anomalies_are_new_and_found_better_than_by_chance(tiny_tower):
    normals = [normal_scan(seed) for seed in range(6)]
    held = self_check.HeldOut.make(normals, tiny_tower, "brain MRI", seed=0)
    assert held.masks.flatten(1).any(dim=1).tolist() == [False, True, True] * self_check.NORMALS
    found = self_check.check(PatchMemory(tiny_tower).fit(normals), held, "patch memory", lambda: True)
    assert (found.anomalies, found.normals) == (16, 8)
    assert found.pixel_auroc > 0.7
    again = self_check.HeldOut.make(normals, tiny_tower, "brain MRI", seed=0)
    assert torch.equal(held.pixels, again.pixels)


def test_a_reference_is_not_compared_with_itself_in_the_self_check(tiny_tower):
    normals = [normal_scan(seed) for seed in range(4)]
    memory = PatchMemory(tiny_tower).fit(normals)
    from fmclip.detectors.base import to_pixels

    pixels, content, _ = to_pixels(normals, tiny_tower)
    _, alone = memory.predict_synthetic(pixels, content, torch.arange(4))
    seen = [found.score for found in memory.predict(normals)]
    assert all(alone[place] > seen[place] for place in range(4))


def test_the_area_under_the_curve_is_scikit_learns():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    scores, truth = rng.integers(0, 9, 50) / 9, rng.random(50) < 0.4
    assert self_check.auroc(scores, truth) == pytest.approx(roc_auc_score(truth, scores))


def test_paces_estimate_what_was_measured_and_nothing_else():
    paces, plan = Paces(), [("a", 10), ("b", 4)]
    paces.note(("mini", "cpu"), "a", 5.0, 10)
    assert paces.estimate(("mini", "cpu"), plan) is None
    paces.note(("mini", "cpu"), "b", 8.0, 4)
    assert paces.estimate(("mini", "cpu"), plan) == pytest.approx(13.0)
    assert paces.estimate(("mini", "cpu"), [("a", 20), ("b", 4)]) == pytest.approx(18.0)
    assert paces.estimate(("other", "cpu"), plan) is None


@pytest.fixture
def quick(monkeypatch):
    settings = {"stage2_epochs": 6, "stage3_epochs": 0, "pool_size": 16, "batch_size": 4}
    monkeypatch.setitem(fusionmedclip.PRESETS, "fast", settings)
    monkeypatch.setattr(PACES, "_seconds", {})


def test_a_session_goes_on_after_a_stop_and_for_longer_after_the_end(quick, monkeypatch):
    monkeypatch.setitem(fusionmedclip.PRESETS["fast"], "stage2_epochs", 150)  # long enough to be stopped
    normals, query = [normal_scan(seed) for seed in range(4)], [normal_scan(9)]
    session, whole = Session("tiny", "cpu"), Session("tiny", "cpu")
    varied = {"learn_temperature": False}
    with pytest.raises(FmclipError, match="press Adapt first"):
        list(session.go_on())
    for one in session.adapt(normals, preset="fast", settings=varied):
        if isinstance(one, Progress) and one.stage == STAGE2 and one.step:
            session.stop()
    assert not session.unfinished.is_over
    resumed = list(session.go_on())
    assert resumed[-1].stage == "stage 2"
    list(whole.adapt(normals, preset="fast", settings=varied))
    assert session.query(query)[0].score == whole.query(query)[0].score
    list(session.go_on())
    assert session.detector.config.stage2_epochs == 300
    assert session.detector.config.learn_temperature is False
    assert estimate_seconds("tiny", "cpu", "fusionmedclip", "fast", 4, varied) > 0
    with pytest.raises(ValueError, match="no setting heads"):
        list(session.adapt(normals, settings={"heads": "common"}))
    assert estimate_seconds("tiny", "cpu", "cosine", "fast", 4) is None


def stopped_in_stage_2(session: Session, normals, **options) -> None:
    for one in session.adapt(normals, preset="fast", **options):
        if isinstance(one, Progress) and one.stage == STAGE2 and one.step:
            session.stop()


def test_a_stop_before_the_first_step_of_a_resumed_training_leaves_it_to_be_resumed_again(quick, monkeypatch):
    monkeypatch.setitem(fusionmedclip.PRESETS["fast"], "stage2_epochs", 150)
    normals, session = [normal_scan(seed) for seed in range(4)], Session("tiny", "cpu")
    stopped_in_stage_2(session, normals)
    before = session.unfinished
    for _ in session.go_on():
        session.stop()
    assert session.unfinished.normals == before.normals
    assert session.unfinished.training.step == before.training.step


def test_a_resumed_training_keeps_the_regions_that_are_normal_from_its_first_step(quick, monkeypatch):
    monkeypatch.setitem(fusionmedclip.PRESETS["fast"], "stage2_epochs", 150)
    normals, odd = [normal_scan(seed) for seed in range(4)], normal_scan(9)
    mask = np.zeros((odd.height, odd.width), bool)
    mask[8:40, 8:40] = True
    session, whole, regions = Session("tiny", "cpu"), Session("tiny", "cpu"), [NormalRegion(odd, mask)]
    stopped_in_stage_2(session, normals, regions=regions)
    assert not session.unfinished.is_over
    list(session.go_on())
    list(whole.adapt(normals, preset="fast", regions=regions))
    np.testing.assert_array_equal(session.query([odd])[0].map, whole.query([odd])[0].map)


def test_a_plan_that_goes_on_holds_what_is_left(quick):
    job = Job("tiny", "cpu", "fusionmedclip", "fast", "scan", 0, tuple(normal_scan(seed) for seed in range(4)))
    start = Training(STAGE2, 4, 6, True, {}, {}, torch.empty(0), torch.empty(0))
    from dataclasses import replace

    assert [steps for _, steps in job.plan()] == [16, 16, 6]
    assert [steps for _, steps in replace(job, start=start).plan()] == [16, 16, 2]


def test_a_stop_between_the_last_step_and_its_answer_is_resumed_and_not_made_longer(quick, monkeypatch):
    normals, query = [normal_scan(seed) for seed in range(4)], [normal_scan(9)]
    session, whole = Session("tiny", "cpu"), Session("tiny", "cpu")
    settle = fusionmedclip.FusionMedCLIP._settle

    def stopped_before_it_answers(detector, tower, network, *rest):
        if network is not None:
            session.stop()
            raise Stopped
        return settle(detector, tower, network, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(fusionmedclip.FusionMedCLIP, "_settle", stopped_before_it_answers)
        stopped = list(session.adapt(normals, preset="fast"))
    assert stopped[-1].stage == "patch memory"
    assert session.unfinished.training.is_over
    assert not session.unfinished.is_over
    assert list(session.go_on())[-1].stage == "stage 2"
    assert session.unfinished.is_over
    assert session.detector.config.stage2_epochs == 6
    list(whole.adapt(normals, preset="fast"))
    assert session.query(query)[0].score == whole.query(query)[0].score


@pytest.fixture
def page(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(uploads, "get_upload_folder", lambda: str(tmp_path / "cache"))
    visitors = Visitors(lambda: Session("tiny", "cpu"))
    handlers = Handlers(visitors, [], CPU)
    handlers.add_references(pictures(tmp_path / "cache", 1, 2, 3, 4), *PLAIN, ME)
    return handlers, Teaching(handlers), visitors


def test_the_page_shows_self_check_estimate_and_more_steps(page):
    handlers, teaching, visitors = page
    after = shown(handlers.adapt("brain MRI", "fast", ME))
    assert "never trained on" in after["self_check"]
    assert after["self_check"].count("fm-full") == 2  # patch memory and stage 2
    assert after["go_on"] == {**after["go_on"], "value": "More steps", "visible": True}
    assert "for 4 reference scans, by the steps measured" in after["estimate"]
    assert "Adapted to 4" in shown(teaching.go_on(ME))["status"]
    assert visitors.get(ME).session.detector.config.stage2_epochs == 12


def test_other_references_than_those_learned_from_are_not_gone_on_with(page, tmp_path):
    handlers, teaching, _ = page
    shown(handlers.adapt("brain MRI", "fast", ME))
    handlers.add_references(pictures(tmp_path / "cache", 5), *PLAIN, ME)
    assert "have changed since" in shown(teaching.go_on(ME))["status"]


def test_each_synthetic_anomaly_is_made_again_from_its_record(page):
    handlers, teaching, visitors = page
    after = shown(handlers.adapt("brain MRI", "fast", ME))
    examples = visitors.get(ME).examples
    assert after["synthetic"].count("fm-example") == len(examples)
    assert all(f"<small>{one.strength}</small>" in after["synthetic"] for one in examples if one.strength)
    for place in range(len(examples)):
        assert "the same picture, bit for bit" in teaching.replay(event(index=place), ME)["replay"]
    assert after["records"]["value"].endswith(".json")
    visitors.get(ME).references.reverse()
    replays = [teaching.replay(event(index=place), ME)["replay"] for place in range(len(examples))]
    assert any("another picture" in one for one in replays)
