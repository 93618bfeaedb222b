"""The drop-in for NVlabs' torch_utils.ops: their signatures, switching over and back."""

import inspect
import types

import pytest
import torch

import genfast
import genfast.integrations.stylegan as ops
from genfast.reference import filtering as reference

# Names and defaults of stylegan3's torch_utils/ops/{bias_act,upfirdn2d}.py.
SIGNATURES = {
    "bias_act": "(x, b=None, dim=1, act='linear', alpha=None, gain=None, clamp=None, impl='cuda')",
    "upfirdn2d": "(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1, impl='cuda')",
    "filter2d": "(x, f, padding=0, flip_filter=False, gain=1, impl='cuda')",
    "upsample2d": "(x, f, up=2, padding=0, flip_filter=False, gain=1, impl='cuda')",
    "downsample2d": "(x, f, down=2, padding=0, flip_filter=False, gain=1, impl='cuda')",
}
SETUP = {"f": None, "device": "cpu", "normalize": True, "flip_filter": False, "gain": 1,
         "separable": None}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_nvlabs(name):
    found = inspect.signature(getattr(ops, name))
    bare = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def test_setup_filter_takes_the_same_arguments():
    parameters = inspect.signature(ops.setup_filter).parameters
    assert list(parameters) == list(SETUP)
    for name in list(SETUP)[1:]:
        assert parameters[name].default == SETUP[name], name


@pytest.mark.parametrize("impl", ["cuda", "ref"])
def test_results(impl):
    x, b, f = torch.randn(2, 3, 8, 8), torch.randn(3), ops.setup_filter([1, 3, 3, 1])
    y = ops.bias_act(x, b, act="lrelu", gain=2, clamp=1, impl=impl)
    want = reference.bias_act(x, b, act="lrelu", alpha=0.2, gain=2.0, clamp=1.0)
    torch.testing.assert_close(y, want)
    assert torch.equal(ops.bias_act(x, clamp=-1, impl=impl), x)  # theirs: no clamp
    y = ops.upfirdn2d(x, f, up=[2, 1], down=2, padding=[1, 2, 3, 0], gain=4, impl=impl)
    want = reference.upfirdn2d(x, f, (2, 1), (2, 2), (1, 2, 3, 0), False, 4.0)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(ops.upsample2d(x, f, impl=impl), genfast.upsample2d(x, f))
    torch.testing.assert_close(ops.downsample2d(x, f, impl=impl), genfast.downsample2d(x, f))
    torch.testing.assert_close(ops.filter2d(x, f, impl=impl), genfast.filter2d(x, f))


def test_enabled_switches_over_and_back():
    theirs = types.SimpleNamespace(
        bias_act=types.SimpleNamespace(bias_act=1),
        upfirdn2d=types.SimpleNamespace(
            setup_filter=2, upfirdn2d=3, filter2d=4, upsample2d=5, downsample2d=6
        ),
    )
    with pytest.raises(RuntimeError, match="inside"), ops.enabled(theirs):
        assert theirs.bias_act.bias_act is ops.bias_act
        assert theirs.upfirdn2d.upsample2d is ops.upsample2d
        raise RuntimeError("inside")
    assert theirs.bias_act.bias_act == 1 and theirs.upfirdn2d.setup_filter == 2
    assert theirs.upfirdn2d.downsample2d == 6
    with pytest.raises(AttributeError), ops.enabled(types.SimpleNamespace()):
        pass


def test_an_unknown_impl_is_named():
    with pytest.raises(ValueError, match="impl: expected"):
        ops.bias_act(torch.zeros(1, 1), impl="cpu")
