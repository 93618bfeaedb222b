"""What many rows of attention share: a mask's gradient, and the noise of packed sequences."""

import pytest
import torch
import torch.nn.functional as F

import genfast


@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (1, 8, 1, 64), (1, 1, 512, 64)])
def test_gradient_of_a_mask_that_many_rows_share(shape):
    """Their sums are as exact as PyTorch's."""
    q, k, v = (torch.randn(8, 8, n, 64) for n in (512, 64, 64))
    mask, g = torch.randn(shape), torch.randn(8, 8, 512, 64)

    def gradient(dtype, call):
        m = mask.to(dtype).requires_grad_()
        out = call(*(x.to(dtype) for x in (q, k, v)), m)
        return torch.autograd.grad(out, m, g.to(dtype))[0]

    want = gradient(torch.float64, F.scaled_dot_product_attention)
    ours = gradient(torch.float32, lambda q, k, v, m: genfast.attention(q, k, v, mask=m))
    eager = gradient(torch.float32, F.scaled_dot_product_attention)
    error, of_eager = ((x - want).abs().max() for x in (ours, eager))
    assert error <= 3 * of_eager + 1e-6 * want.abs().max()


def test_dropout_of_packed_rows_is_the_same_on_every_road():
    """Also where no road can read how long the longest sequence is."""
    q, cu = torch.randn(7, 2, 8), torch.tensor([0, 3, 7], dtype=torch.int32)

    def f(q):
        return genfast.attention_varlen(q, q, q, cu, cu, dropout_p=0.5, seed=5)

    want = f(q)
    torch.testing.assert_close(torch.compile(f, backend="eager")(q), want)
    torch.testing.assert_close(torch.func.vjp(f, q)[0], want)
    longest = genfast.attention_varlen(q, q, q, cu, cu, 7, 7, dropout_p=0.5, seed=5)
    assert torch.equal(longest, want)
