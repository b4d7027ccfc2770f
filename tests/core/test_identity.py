"""A hash of weights: the same for one model in another form, another for another model."""

import pytest
import torch
from torch import nn

from diffalign.core import UnsupportedModel
from diffalign.core.identity import model_hash, remembered


class Net(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.first = nn.Linear(8, width)
        self.second = nn.Linear(width, 2)
        with torch.no_grad():
            for i, weight in enumerate(self.parameters()):
                weight.copy_(torch.arange(weight.numel()).reshape(weight.shape) + i)


class Other(Net):
    pass


class Adapted(nn.Module):
    """A layer with an adapter, as PEFT wraps it."""

    def __init__(self, layer, change):
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"a": nn.Linear(8, 1, bias=False)})
        self.lora_B = nn.ModuleDict({"a": nn.Linear(1, 3, bias=False)})
        nn.init.constant_(self.lora_B["a"].weight, change)
        self.active_adapters, self.scaling, self.disable_adapters = ["a"], {"a": 1.0}, False


def adapted(change):
    net = Net()
    net.first = Adapted(net.first, change)
    return net


def test_a_hash_is_sixteen_hex_digits_and_repeats():
    assert model_hash(Net()) == model_hash(Net())
    assert len(model_hash(Net())) == 16
    int(model_hash(Net()), 16)


def test_precision_and_wrappers_change_nothing():
    plain = model_hash(Net())
    assert model_hash(Net().to(torch.bfloat16)) == plain
    assert model_hash(Net().to(torch.float16)) == plain
    wrapper = nn.Module()
    wrapper._orig_mod = nn.Module()
    wrapper._orig_mod.module = Net()
    assert model_hash(wrapper) == plain


def test_class_shape_name_and_leading_values_count():
    nets = [Net(), Other(), Net(4)]
    changed, renamed = Net(), Net()
    with torch.no_grad():
        changed.second.bias[1] += 1
    renamed.third = renamed.second
    del renamed.second
    hashes = {model_hash(net) for net in (*nets, changed, renamed)}
    assert len(hashes) == 5


def test_only_four_values_of_a_tensor_are_read():
    net = Net()
    with torch.no_grad():
        net.first.weight.flatten()[4:] += 100
    assert model_hash(net) == model_hash(Net())
    with torch.no_grad():
        net.first.weight.flatten()[3] += 100
    assert model_hash(net) != model_hash(Net())


def test_copies_for_fused_projections_are_left_out():
    net = Net()
    net.attention = nn.Module()
    plain = model_hash(net)
    net.attention.to_qkv = nn.Linear(8, 24)
    assert model_hash(net) == plain


def test_an_adapter_counts_only_when_it_changes_the_model():
    plain = model_hash(Net())
    assert model_hash(adapted(0.0)) == plain
    assert model_hash(adapted(0.5)) != plain
    silent = adapted(0.5)
    silent.first.scaling["a"] = 0.0
    assert model_hash(silent) == plain
    disabled = adapted(0.5)
    disabled.first.disable_adapters = True
    assert model_hash(disabled) == plain


def test_weights_that_are_not_in_memory_are_refused():
    with pytest.raises(UnsupportedModel, match=r"Net cannot be recognised: first\.bias"):
        model_hash(Net().to("meta"))


def test_within_the_block_a_model_is_read_once():
    net, hashes = Net(), {}
    first = model_hash(net)
    with remembered(hashes):
        assert model_hash(net) == first
        with torch.no_grad():
            net.first.weight.add_(1.0)
        assert model_hash(net) == first
        assert model_hash(Other()) == model_hash(Other()) != first
    assert model_hash(net) != first
    with remembered(hashes):
        assert model_hash(net) == first
