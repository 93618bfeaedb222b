"""Random shapes, strides, dtypes and arguments: the reference's value."""

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from test_properties import FLOATS, layouts, same, wide

import genfast
from genfast.reference import normalization as reference
from genfast.reference.normalization import ACTIVATIONS


@settings(max_examples=150)
@given(st.data(), st.lists(st.integers(0, 5), min_size=2, max_size=5).map(tuple))
def test_norms(data, shape):
    x = data.draw(layouts(shape, data.draw(st.sampled_from(FLOATS))))
    kind = data.draw(st.sampled_from(["group", "layer", "rms"]))
    C = shape[1 if kind == "group" else -1]
    dtype = data.draw(st.sampled_from([x.dtype, torch.float32]))

    def maybe(*of):
        return data.draw(layouts(of, dtype)) if data.draw(st.booleans()) else None

    w, b, s, t = maybe(C), maybe(C), maybe(shape[0], C), maybe(shape[0], C)
    act, eps = data.draw(st.sampled_from(list(ACTIVATIONS))), 0.1
    options = {"scale": s, "shift": t, "act": act, "eps": eps}
    if kind == "group":
        groups = data.draw(st.sampled_from([n for n in range(1, 6) if C % n == 0]))
        y = genfast.group_norm(x, groups, w, b, **options)
    elif kind == "layer":
        groups, y = 0, genfast.layer_norm(x, w, b, **options)
    else:
        groups, b = 0, None
        y = genfast.rms_norm(x, w, **options)
    assert y.shape == x.shape and y.dtype == x.dtype
    if not y.numel():
        return
    truth = reference.normalize(
        *(None if v is None else wide(v).double() for v in (x, w, b, s, t)), groups=groups,
        rms=kind == "rms", act=act, eps=eps,
    )  # fmt: skip
    coarse = dtype != torch.float64 and x.dtype == torch.float64
    same(y, truth, torch.float32 if coarse else x.dtype)
