"""Which layers a glob pattern ties, and what quantize() makes of them."""

import pytest
import torch
from torch import nn

import infoq_fx
from infoq_fx.errors import OptionError


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        scores = self.q_proj(x) @ self.k_proj(x).transpose(1, 2)
        return x + self.out_proj(scores.softmax(-1) @ self.v_proj(x))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(Attention(8), Attention(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layers(x).mean(1))


QKV = ("*.q_proj", "*.k_proj", "*.v_proj")
OF_LAYER = [tuple(f"layers.{i}.{name}.weight" for name in ("q_proj", "k_proj", "v_proj")) for i in (0, 1)]


@pytest.fixture(scope="module")
def data():
    return torch.randn(32, 5, 8, generator=torch.Generator().manual_seed(1))


def prepare(data, **options):
    return infoq_fx.prepare(Network().eval(), data, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tie", "ties"),
    [
        ((), []),
        ([QKV], OF_LAYER),
        ([("*_proj",)], [(*names, f"layers.{i}.out_proj.weight") for i, names in enumerate(OF_LAYER)]),
        ([("*.0.v_proj", "*.0.q_proj")], [(OF_LAYER[0][0], OF_LAYER[0][2])]),
        ([("*.1.q_proj", "*.1.k_proj"), ("*.1.v_proj", "*.1.k_proj")], [OF_LAYER[1]]),
        ([("*.1.*",)], [(*OF_LAYER[1], "layers.1.out_proj.weight")]),
    ],
    ids=["none", "below each parent", "one pattern", "one parent", "overlapping", "all below"],
)
def test_ties_are_of_matches_below_one_parent(tie, ties, data):
    inventory = prepare(data, tie=tie).inventory
    assert list(inventory.ties) == ties


@pytest.mark.slow
def test_ignored_layers_are_in_no_tie(data):
    assert list(prepare(data, tie=[QKV], ignore=["layers.0"]).inventory.ties) == OF_LAYER[1:]
    assert list(prepare(data, tie=[QKV], ignore=["*.k_proj"]).inventory.ties) == [(q, v) for q, _, v in OF_LAYER]


def test_a_pin_of_one_layer_pins_all(data):
    inventory = prepare(data, tie=[QKV], pin={"layers.0.k_proj": 4}).inventory
    assert [inventory[name].bits for name in OF_LAYER[0]] == [(4,)] * 3
    assert inventory[OF_LAYER[1][0]].bits == (2, 3, 4, 5, 6, 7, 8)


class Shared(nn.Module):
    """One weight of two layers."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 8), nn.Linear(8, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x).relu())


@pytest.mark.parametrize(
    ("pin", "bits"),
    [
        ({"embedding": 4}, (4,)),
        ({"embedding": 4, "head": 4}, (4,)),
        ({"*": 8, "head": 4}, (4,)),
        ({"head": 4, "*": 8}, (8,)),
        (
            {"embedding": 4, "head": 8},
            "pin has 'embedding': 4 and 'head': 8, but 'embedding' and 'head' share the weight",
        ),
        ({"head*": 3, "e*": 8}, "share the weight 'head.weight'; pin one of them, or both alike"),
    ],
    ids=["one", "alike", "all and one", "one and all", "apart", "patterns"],
)
def test_pins_of_a_shared_weight_agree(pin, bits):
    def prepare():
        return infoq_fx.prepare(Shared().eval(), torch.randint(0, 6, (32, 5)), pin=pin)

    if isinstance(bits, str):
        with pytest.raises(OptionError, match=bits):
            prepare()
    else:
        assert prepare().inventory["head.weight"].bits == bits


@pytest.mark.parametrize(
    ("options", "nearest"),
    [
        ({"pin": {"layers.0.q_porj": 8}}, ["layers.0.q_proj"]),
        ({"pin": {"layers.0.q_porj.input": 8}}, ["layers.0.q_proj.input"]),
        ({"tie": [("layers.0.inputs", "head")]}, []),
        ({"ignore": ["head.weight"]}, ["head"]),
    ],
    ids=["pin", "pin of an activation", "tie", "ignore"],
)
def test_hints_are_of_what_can_be_given(options, nearest, data):
    with pytest.raises(OptionError, match="unknown layer in") as caught:
        prepare(data, **options)
    hints = str(caught.value).partition("nearest")[2]
    assert all(repr(name) in hints for name in nearest)
    assert ("input" in hints) == any("input" in name for name in nearest)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tie": [("*.q_porj", "*.k_proj")]}, r"unknown layer in tie '\*.q_porj'; nearest.*q_proj"),
        ({"tie": [("head",)]}, r"matches only 'head.weight' below 'the model'; give patterns"),
        (
            {"tie": [("*.q_proj",)]},
            r"'layers.0.q_proj.weight' below 'layers.0', and 'layers.1.q_proj.weight' below 'layers.1'.*; give .*"
            r"or name the modules, as \('layers.0', 'layers.1'\) ties",
        ),
        ({"tie": [QKV], "ignore": ["layers"]}, "matches no layer with a quantized weight; leave"),
        (
            {"tie": [QKV], "pin": {"layers.0.q_proj": 4, "layers.0.v_proj": 8}},
            r"tied layers have no bit-width in common: 'layers.0.q_proj.weight' has \(4,\), .*; pin one",
        ),
        ({"tie": ["*.q_proj", "*.k_proj"]}, r"tie=\['\*.q_proj', .*; give a list of groups"),
        ({"tie": "*.q_proj"}, "give a list of groups"),
        ({"tie": [()]}, "give a list of groups"),
    ],
    ids=["name", "one layer", "one a parent", "ignored", "pins", "flat", "text", "empty"],
)
def test_ties_that_cannot_be_are_refused(options, message, data):
    with pytest.raises(OptionError, match=message):
        prepare(data, **options)


@pytest.mark.slow
def test_quantize_gives_tied_layers_one_bit_width(data, tmp_path):
    quantized = infoq_fx.quantize(
        Network().eval(), 3.5, calibration_data=data, tie=[QKV], recovery="none", progress=False
    )
    bits = infoq_fx.allocation_of(quantized).bits
    for names in OF_LAYER:
        assert len({bits[name] for name in names}) == 1
        assert f"tied to one bit-width: {', '.join(names)}" in infoq_fx.summarize(quantized)
    infoq_fx.save_quantized(quantized, tmp_path / "model.pt2")
    assert list(infoq_fx.allocation_of(infoq_fx.load_quantized(tmp_path / "model.pt2")).ties) == OF_LAYER


@pytest.mark.slow
def test_an_allocation_of_ones_own_keeps_the_ties(data):
    prepared = prepare(data, tie=[QKV])
    bits = {site.name: 8 for site in prepared.inventory.sites}
    infoq_fx.convert(prepared, infoq_fx.Allocation(bits=bits))
    with pytest.raises(OptionError, match=r"tied sites .*'layers.0.q_proj.weight': 4.* bits; give them one"):
        infoq_fx.convert(prepared, infoq_fx.Allocation(bits=bits | {OF_LAYER[0][0]: 4}))
