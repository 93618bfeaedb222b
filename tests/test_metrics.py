"""Metrics: against hand-made cases, and against other implementations."""

import math

import pytest
import torch

import genfast
from genfast.metrics import images, text
from genfast.train import data

SEED = 3


def points(n, stream, shift=0.0, width=4):
    return genfast.randn(n, width, seed=SEED, stream=stream) + shift


def test_prdc_of_points_on_a_line():
    """By hand, k = 1: real balls around 0, 1, 10 have radii 1, 1, 9."""
    real = torch.tensor([[0.0], [1.0], [10.0]])
    drawn = torch.tensor([[0.5], [0.6], [30.0]])
    found = images.precision_recall_density_coverage(real, drawn, k=1)
    # 0.5 and 0.6 lie in the balls of 0 and 1, and 9.4 > 9 away from 10; 30 in none. Drawn radii:
    # 0.1, 0.1, 29.4: only 10 is in a drawn ball (20 < 29.4), and 1 too (29 < 29.4).
    assert found == pytest.approx(
        {"precision": 2 / 3, "recall": 2 / 3, "density": 4 / 3, "coverage": 2 / 3}
    )


def test_prdc_is_the_definition_in_loops():
    real, drawn, k = points(40, 0), points(30, 1, 0.7), 3
    d = lambda a, b: (a - b).double().norm().item()  # noqa: E731
    radius = {
        name: [sorted(d(a, b) for b in x)[k] for a in x]
        for name, x in (("real", real), ("drawn", drawn))
    }
    hits = [[d(r, f) < radius["real"][i] for i, r in enumerate(real)] for f in drawn]
    want = {
        "precision": sum(map(any, hits)) / 30,
        "density": sum(map(sum, hits)) / 30 / k,
        "recall": sum(any(d(r, f) < radius["drawn"][j] for j, f in enumerate(drawn))
                      for r in real) / 40,
        "coverage": sum(min(d(r, f) for f in drawn) < radius["real"][i]
                        for i, r in enumerate(real)) / 40,
    }  # fmt: skip
    found = images.precision_recall_density_coverage(real, drawn, k)
    assert found == pytest.approx(want) and 0 < found["coverage"] < 1


def test_prdc_of_the_same_and_of_far_sets():
    real = points(200, 0)
    same = images.precision_recall_density_coverage(real, points(200, 1))
    assert all(same[k] > 0.85 for k in ("precision", "recall", "coverage"))
    assert same["density"] == pytest.approx(1, abs=0.15)
    far = images.precision_recall_density_coverage(real, points(200, 1, 20.0))
    assert set(far.values()) == {0.0}
    with pytest.raises(ValueError, match="drawn: expected more than k = 5 rows"):
        images.precision_recall_density_coverage(real, real[:5])


class Flat(torch.nn.Module):
    num_features = 4

    def forward(self, x):
        return x.flatten(1).double()


def test_frechet_distance_is_its_formula():
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the root by eigenvalues."""
    a, b = (torch.sigmoid(points(300, s, s * 0.3)).view(-1, 1, 2, 2) for s in (0, 1))
    found = images.frechet_distance(Flat(), a, b)
    x, y = a.flatten(1).double(), b.flatten(1).double()
    roots = torch.linalg.eigvals(x.T.cov() @ y.T.cov()).real.clamp_min(0).sqrt().sum()
    want = (x.mean(0) - y.mean(0)).square().sum() + (x.T.cov() + y.T.cov()).trace() - 2 * roots
    assert found == pytest.approx(want.item(), rel=1e-3) and found > 0.01
    assert images.frechet_distance(Flat(), a, a) == pytest.approx(0, abs=1e-6)


def test_the_classifier_is_the_same_for_the_same_seed_and_knows_digits():
    digits = data.split(data.load("digits"))
    torch.manual_seed(1)
    one = images.trained_classifier(digits, 0, steps=250)
    torch.manual_seed(2)
    two = images.trained_classifier(digits, 0, steps=250)
    for k, v in one.state_dict().items():
        assert torch.equal(v, two.state_dict()[k]), k
    assert one.accuracy > 0.9  # measured 0.96; chance is 0.1
    assert one(digits.test.images).shape == (180, one.num_features)


def test_psnr():
    x = torch.full((2, 1, 2, 2), 0.5)
    assert images.psnr(x + 0.1, x).item() == pytest.approx(20, abs=1e-4)
    with pytest.raises(ValueError, match="truth: expected"):
        images.psnr(x, x[0])


def test_features_that_are_not_finite_are_no_precision_of_0():
    x = points(20, 0)
    with pytest.raises(ValueError, match="drawn: expected finite features"):
        images.precision_recall_density_coverage(x, x / 0)


def test_perplexity_and_bits():
    assert text.perplexity(10 * math.log(7), 10) == pytest.approx(7)
    assert text.bits_per_byte(8 * math.log(2), "añb") == pytest.approx(2)
    with pytest.raises(ValueError, match="tokens: expected"):
        text.perplexity(1.0, 0)
    assert text.perplexity(1e9, 3) == math.inf and math.isnan(text.perplexity(math.nan, 3))
    for wrong in ("", b"bytes"):
        with pytest.raises(ValueError, match="text: expected a str of at least one character"):
            text.bits_per_byte(1.0, wrong)
    with pytest.raises(TypeError, match="nll: expected a number"):
        text.perplexity(None, 3)


def test_pair_bits():
    training = [list(b"abab"), list(b"abc")]
    of_one = [text.pair_bits(training, [[i]]) for i in range(text.TOKENS)]
    assert sum(2**-bits for bits in of_one) == pytest.approx(1)
    after_a = [2 * text.pair_bits(training, [[97, i]]) - of_one[97] for i in range(text.TOKENS)]
    assert sum(2**-bits for bits in after_a) == pytest.approx(1)
    assert after_a[98] == min(after_a) and after_a[98] < of_one[98]
    for rows in ((training, []), ([[]], training)):
        with pytest.raises(ValueError, match="at least one token"):
            text.pair_bits(*rows)
    with pytest.raises(TypeError, match="test: expected a sequence of sequences"):
        text.pair_bits(training, [1, 2])


def test_bleu():
    wanted = ["the cat sat on the mat", "there is a dog in the garden"]
    assert text.bleu(wanted, wanted) == pytest.approx(100)
    other = ["the cat sat on a mat", "there was a dog in the garden"]
    assert 30 < text.bleu(other, wanted) < 80
    with pytest.raises(ValueError, match="as many sentences"):
        text.bleu(["a"], [])


def test_every_data_set_is_real():
    shapes = {"digits": (1797, 1, 8, 8), "faces": (200, 1, 24, 24), "photos": (120, 3, 32, 32)}
    for name, shape in shapes.items():
        found = data.load(name)
        assert tuple(found.images.shape) == shape and found.images.dtype == torch.float32, name
        assert 0 <= found.images.min() < 0.1 and 0.9 < found.images.max() <= 1
        assert len(found.labels) == len(found) and found.images.flatten(1).std(1).mean() > 0.1
        assert set(found.labels.tolist()) == set(range(10 if name == "digits" else 2))
