"""convolution: convolutions, alone and with what stands next to them, against the PyTorch lines
that they replace, eager and compiled, in the sizes of U-Nets' levels and of Stable Diffusion's.

flops: of the plain lines, so that the share of the peak shows the products that were saved.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import genfast
from genfast.benchmarks.compare import compare, draw
from genfast.benchmarks.harness import Case, Work, assert_judged
from genfast.reference import convolution as reference


def _draw(shape, stream, device) -> Tensor:
    x = draw(shape, stream, device)
    # `to`: `contiguous` leaves one channel in the strides of the other order
    return x.to(memory_format=torch.channels_last) if len(shape) == 4 else x


def _conv2d(shape, outputs, backward, device) -> Work:
    shapes = shape, (outputs, shape[1], 3, 3), (outputs,)
    leaves = [_draw(s, n, device) for n, s in enumerate(shapes)]
    return compare(partial(genfast.conv2d, padding=1), reference.conv2d, leaves, backward)


def _upsampled(shape, backward, device) -> Work:
    C = shape[1]
    leaves = [_draw(s, n, device) for n, s in enumerate((shape, (C, C, 3, 3), (C,)))]
    return compare(genfast.upsampled_conv2d, reference.upsampled_conv2d, leaves, backward)


def _residual(shape, inputs, device) -> Work:
    B, C, H, W = shape
    shapes = [shape, (B, inputs or C, H, W), (C, C, 3, 3), (C,)]
    shapes += [(C, inputs, 1, 1), (C,)] if inputs else []
    leaves = [_draw(s, n, device) for n, s in enumerate(shapes)]
    ours = partial(genfast.residual_conv2d, *leaves)
    plain = reference.residual_conv2d

    def proof():
        truth = plain(*(x.double() for x in leaves))
        assert_judged("value", ours(), plain(*leaves), truth)

    return Work(
        ours=ours,
        rivals={"eager": partial(plain, *leaves)},
        late={"compile": lambda: partial(torch.compile(plain, dynamic=False), *leaves)},
        proof=proof,
    )


def _flops(shape, inputs) -> int:
    B, C, H, W = shape
    return 2 * B * H * W * C * inputs


CASES = [
    Case("convolution", f"conv2d nhwc{name}", (*shape, outputs),
         partial(_conv2d, shape, outputs, backward),
         flops=(3 if backward else 1) * _flops(shape, 9 * outputs))
    for shape, outputs in (
        ((32, 16, 28, 28), 16), ((32, 96, 14, 14), 32), ((32, 64, 7, 7), 64),
        ((1, 64, 128, 128), 64), ((2, 320, 32, 32), 320),
        ((32, 1, 28, 28), 16), ((32, 16, 28, 28), 1), ((1, 128, 256, 256), 3),
    )
    for name, backward in {"": False, " fwd+bwd": True}.items()
] + [
    Case("convolution", f"upsampled nhwc{name}", shape, partial(_upsampled, shape, backward),
         flops=(3 if backward else 1) * _flops(shape, 4 * 9 * shape[1]))
    for shape in ((32, 64, 7, 7), (32, 32, 14, 14), (4, 320, 16, 16))
    for name, backward in {"": False, " fwd+bwd": True}.items()
] + [
    Case("convolution", f"residual nhwc, {'projection' if inputs else 'identity'}", shape,
         partial(_residual, shape, inputs), flops=_flops(shape, 9 * shape[1] + inputs))
    for shape, inputs in (((32, 16, 28, 28), 0), ((32, 16, 28, 28), 48), ((32, 32, 14, 14), 96))
]  # fmt: skip
