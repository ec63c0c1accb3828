"""Tensors on their way to a GPU: the same afterwards, in one copy."""

import torch

from benchmarks.pretend_gpu import GPU, pretended_gpu
from utils.transfer import packed, to_device, unpacked


def some():
    return [
        torch.tensor([True, False, True]),
        torch.rand(3, 5, generator=torch.Generator().manual_seed(0)).T,
        torch.empty(0, 4, dtype=torch.long),
        torch.tensor(2**62 + 1),
        torch.arange(7, dtype=torch.int16),
        torch.rand(2, dtype=torch.float64),
    ]


def test_what_was_packed_is_unpacked_as_it_was():
    for found, expected in zip(unpacked(packed(some()), some()), some(), strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert torch.equal(found, expected) or expected.dtype == torch.float64
    doubles = some()[-1]
    assert torch.equal(unpacked(packed([some()[0], doubles]), [some()[0], doubles])[1], doubles)


def test_all_go_in_one_copy_that_nobody_waits_for():
    with pretended_gpu() as gpu:
        sent = to_device(some(), GPU)
        assert [(each.dtype, each.shape, each.device) for each in sent] == [(x.dtype, x.shape, GPU) for x in some()]
        assert len(gpu.sent) == 1 and not gpu.uploads and not gpu.unpinned and not gpu.looks


def test_on_a_cpu_nothing_moves():
    tensors = some()
    assert all(a is b for a, b in zip(to_device(tensors, "cpu"), tensors, strict=True))
