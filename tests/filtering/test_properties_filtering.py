"""Random shapes, strides, dtypes and arguments: the reference's value, or ValueError."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from test_properties import FLOATS, layouts, same, wide

import genfast
from genfast.reference import filtering as reference
from genfast.reference.filtering import ACTIVATIONS

EXAMPLES = settings(max_examples=100)
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@EXAMPLES
@given(st.data(), st.lists(st.integers(0, 5), min_size=1, max_size=5).map(tuple))
def test_bias_act(data, shape):
    x = data.draw(layouts(shape, data.draw(st.sampled_from(FLOATS))))
    dim = data.draw(st.integers(0, len(shape) - 1))
    act, b = data.draw(st.sampled_from(list(ACTIVATIONS))), None
    if data.draw(st.booleans()):
        b = data.draw(layouts((shape[dim],), data.draw(st.sampled_from(FLOATS))))
    clamp = data.draw(st.sampled_from([None, 0.5]))
    y = genfast.bias_act(x, b, dim=dim, act=act, clamp=clamp)
    assert y.shape == x.shape and y.dtype == x.dtype
    found = ACTIVATIONS[act]
    truth = reference.bias_act(
        wide(x).double(), None if b is None else b.double(), dim=dim, act=act,
        alpha=found.alpha, gain=found.gain, clamp=clamp,
    )  # fmt: skip
    coarse = b is not None and b.dtype != torch.float64 and x.dtype == torch.float64
    same(y, truth, torch.float32 if coarse else x.dtype)


@EXAMPLES
@given(st.data(), st.tuples(*[st.integers(n, 5) for n in (0, 1, 1, 1)]), pairs, pairs)
def test_upfirdn2d(data, shape, up, down):
    x = data.draw(layouts(shape, data.draw(st.sampled_from(FLOATS))))
    taps = data.draw(st.sampled_from([(3,), (1, 1), (2, 3), (4, 4)]))
    f = data.draw(layouts(taps, torch.float32))
    padding = tuple(data.draw(st.integers(-2, 5)) for _ in range(4))
    flip = data.draw(st.booleans())

    def call():
        return genfast.upfirdn2d(x, f, up=up, down=down, padding=padding, flip_filter=flip)

    high = shape[2] * up[1] + padding[2] + padding[3] - taps[0]
    if min(high, shape[3] * up[0] + padding[0] + padding[1] - taps[-1]) < 0:
        with pytest.raises(ValueError, match="padding: expected the padded image"):
            call()
        return
    truth = reference.upfirdn2d(x.double(), f.double(), up, down, padding, flip)
    loose = {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(x.dtype, 2e-5)
    torch.testing.assert_close(call().double(), truth, rtol=loose, atol=loose)
