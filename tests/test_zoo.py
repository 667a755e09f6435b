"""A member of every model family from capture to onnxruntime; the whole table is written by ``benchmarks/zoo.py``."""

import pytest
import torchvision
from zoo_members import MEMBERS, run_member

from infoq_fx.errors import UnsupportedModelError

NAMES = [
    "squeezenet1_1",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "resnet_fpn_backbone",
    "bert (transformers)",
    "vit (transformers)",
]


def families(names):
    return {torchvision.models.get_model_builder(name).__module__ for name in names}


def test_every_classification_family_of_torchvision_has_a_member():
    known = families(torchvision.models.list_models(module=torchvision.models))
    assert known <= families(name for name, member in MEMBERS.items() if member.group == "classification")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_member_reaches_its_bits_and_onnxruntime_agrees(name, tmp_path):
    if name.endswith("(transformers)"):
        pytest.importorskip("transformers")
    outcome = run_member(MEMBERS[name], tmp_path)
    assert 3.5 < outcome.weight_bits <= 4
    off, default = outcome.differences
    assert off < 0.05
    assert default < 0.2
    integer, convolutions = outcome.convolutions
    # The backbone's three outputs and one that is an output and read again stay in float.
    assert integer == convolutions - (4 if name == "resnet_fpn_backbone" else 0)


@pytest.mark.slow
def test_a_whole_detector_ends_in_a_typed_error(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"cannot capture SSD: .*data-dependent"):
        run_member(MEMBERS["ssdlite320_mobilenet_v3_large"], tmp_path)
