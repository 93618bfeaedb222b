"""q, k and v taken out of one product, and their gradients put together."""

import pytest
import torch

import genfast
from genfast.ops.attention import parts


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(x, heads):
    return tuple(part.transpose(1, 2) for part in x.split(heads, 2))


def attend(take, heads, x, turn=lambda q: q):
    q, k, v = take(x, heads)
    return genfast.attention(turn(q), k, v, causal=True)


@pytest.mark.parametrize("turn", [lambda q: q, lambda q: q * 2.0], ids=["as they are", "changed"])
@pytest.mark.parametrize("heads", [(4, 4, 4), (4, 2, 2)], ids=str)
def test_gradients_are_those_of_views(heads, turn):
    x, g = randn(3, 17, sum(heads), 24).requires_grad_(), randn(3, 4, 17, 24, seed=2)
    found = []
    for take in (parts.apart, plain):
        y = attend(take, heads, x, turn)
        first = torch.autograd.grad(y, x, g, retain_graph=True)[0]
        again = torch.autograd.grad(y, x, g, create_graph=True)[0]
        second = torch.autograd.grad(again.square().sum(), x)[0]
        found.append((y.detach(), first, again.detach(), second))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_whole_is_returned_without_a_copy(monkeypatch):
    made = []
    cat = torch.cat
    monkeypatch.setattr(parts.torch, "cat", lambda *a: made.append(cat(*a)) or made[-1])
    x = randn(2, 9, 12, 16).requires_grad_()
    attend(parts.apart, (4, 4, 4), x).sum().backward()
    assert not made and x.grad.is_contiguous()
    attend(parts.apart, (4, 4, 4), x, lambda q: q * 2.0).sum().backward()
    assert len(made) == 1


def test_a_part_without_use_gets_zeros():
    x = randn(2, 5, 6, 8).requires_grad_()
    q, _, v = parts.apart(x, (2, 2, 2))
    (q.sum() + 3 * v.sum()).backward()
    assert torch.equal(x.grad, torch.tensor([1.0, 1, 0, 0, 3, 3])[:, None].expand_as(x))


def test_memory_like_parts():
    q, k, v = plain(randn(2, 5, 7, 8), (3, 2, 2))
    made = parts.empty_like_parts(q, k, v)
    assert all(a.stride() == b.stride() for a, b in zip(made, (q, k, v), strict=True))
    assert made[1].data_ptr() - made[0].data_ptr() == 3 * 8 * 4
    for others in ((k, q, v), (q, v), (q, k.contiguous(), v), (q[:, :, :4], k, v)):
        made = parts.empty_like_parts(*others)
        assert len({part.untyped_storage().data_ptr() for part in made}) == len(others)
        assert [part.shape for part in made] == [part.shape for part in others]


def test_transforms_and_tracing():
    x = randn(2, 6, 6, 8)
    f = lambda x: attend(parts.apart, (2, 2, 2), x).sum()  # noqa: E731
    want = torch.autograd.grad(attend(plain, (2, 2, 2), x.requires_grad_()).sum(), x)[0]
    x = x.detach()
    torch.testing.assert_close(torch.func.grad(f)(x), want, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    compiled(leaf).backward()
    torch.testing.assert_close(leaf.grad, want, rtol=1e-4, atol=1e-5)
