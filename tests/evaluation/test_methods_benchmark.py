"""The benchmark of all methods: none is left out, none sees abnormal scans beside those that did not."""

from types import SimpleNamespace

import pytest

from benchmarks import methods
from benchmarks.peers import PEERS
from fmclip.detectors import DETECTORS
from fmclip.towers.registry import MINI


@pytest.fixture(autouse=True)
def embedded_tower(monkeypatch):
    """A CNN whose halves were never trained together, as far as a method can see."""
    tower = SimpleNamespace(name=MINI, paired=False, block_widths=())
    monkeypatch.setattr(methods, "get_tower", lambda _name: tower)
    for name, peer in PEERS.items():
        monkeypatch.setitem(DETECTORS, name, peer)


def test_every_method_is_measured_or_refused_on_the_embedded_tower():
    found = methods.passes("vit", seeds=3, ks=[16])
    on_mini = [name for one in found if one.tower == MINI for name in one.methods]
    assert set(on_mini) == set(DETECTORS)
    for one in found:
        for name in one.methods:
            uses = getattr(DETECTORS[name], "uses_abnormals", "never")
            assert one.abnormal_k == 0 or uses != "never"
            assert one.abnormal_k == 16 or uses != "required"
            assert one.seeds == (1 if name in methods.SLOW else 3)


def test_the_transformer_serves_what_the_embedded_tower_cannot_beside_ours():
    on_vit = {name for one in methods.passes("vit", seeds=3, ks=[16]) if one.tower == "vit" for name in one.methods}
    assert {"conrad", "anomalib_anomalydino", "fusionmedclip", "patch_memory"} <= on_vit
    assert not {"two_layer", "cosine", "madclip"} & on_vit
    assert all(one.tower == MINI for one in methods.passes(None, seeds=3, ks=[16]))


def test_chosen_methods_only():
    found = methods.passes("vit", seeds=2, ks=[4], only=["cosine", "conrad"])
    assert {name for one in found for name in one.methods} == {"cosine", "conrad"}
    assert found[0].methods == ["cosine"]  # quick things first


def test_each_k_has_its_own_passes_and_abnormal_scans():
    found = methods.passes(None, seeds=2, ks=[4, 8], only=["two_layer", "madclip"])
    two_layer = [(one.k, one.abnormal_k) for one in found if "two_layer" in one.methods]
    assert two_layer == [(4, 0), (4, 4), (8, 0), (8, 8)]
    assert {name for one in found[-2:] for name in one.methods} == {"madclip"}  # slow ones of every k come last
