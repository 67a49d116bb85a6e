"""The chunked loss against the plain one, in numbers and in the size of what it holds."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparklab.engine.loss import IGNORE, chunked_cross_entropy, full_cross_entropy
from sparklab.planner.items import LossTile

T, H, V = 50, 16, 301


def case(dtype=torch.float64, supervised=0.6):
    torch.manual_seed(0)
    hidden = torch.randn(T, H, dtype=dtype, requires_grad=True)
    head = torch.randn(V, H, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, V, (T,))
    labels[torch.rand(T) > supervised] = IGNORE
    return hidden, head, labels


@pytest.mark.parametrize("sizes", [LossTile(1, 1), LossTile(7, 3), LossTile(8, 4), LossTile(1024, 32)])
def test_loss_and_gradients_equal_the_plain_ones(sizes):
    hidden, head, labels = case()
    plain = full_cross_entropy(hidden, head, labels, 17)
    (2 * plain).backward()
    expected = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    ours = chunked_cross_entropy(hidden, head, labels, 17, sizes)
    (2 * ours).backward()
    # logits and softmax are fp32 in both, so fp64 inputs agree to fp32's precision
    torch.testing.assert_close(ours.double(), plain.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad, expected[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(head.grad, expected[1], rtol=1e-4, atol=1e-7)


def test_frozen_head_gets_no_gradient_and_hidden_the_same():
    hidden, head, labels = case()
    full_cross_entropy(hidden, head, labels, 5).backward()
    expected = hidden.grad.clone()
    hidden.grad = None
    frozen = head.detach()
    chunked_cross_entropy(hidden, frozen, labels, 5, LossTile(8, 3)).backward()
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-4, atol=1e-7)
    assert frozen.grad is None


def test_value_by_hand():
    """Two tokens, three words, logits 0: each costs ln 3; one is masked, the other divided by a count of 4."""
    loss = chunked_cross_entropy(torch.zeros(2, 4), torch.zeros(3, 4), torch.tensor([1, IGNORE]), 4)
    assert loss.item() == pytest.approx(1.0986123 / 4)


def test_no_label_at_all_is_zero_with_zero_gradient():
    hidden, head, _ = case()
    loss = chunked_cross_entropy(hidden, head.detach(), torch.full((T,), IGNORE), 3)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.abs().max() == 0


def test_micro_batches_add_up_to_one_mean():
    hidden, head, labels = case()
    count = int((labels != IGNORE).sum())
    whole = chunked_cross_entropy(hidden, head, labels, count)
    parts = sum(chunked_cross_entropy(hidden[a:b], head, labels[a:b], count) for a, b in ((0, 13), (13, 40), (40, T)))
    torch.testing.assert_close(parts, whole)


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize(("loss", "holds_all"), [(chunked_cross_entropy, False), (full_cross_entropy, True)])
def test_only_the_plain_loss_ever_holds_all_logits(loss, holds_all):
    hidden, head, labels = case(torch.float32, supervised=1.0)
    with _Largest() as largest:
        options = {} if holds_all else {"sizes": LossTile(10, 4)}
        loss(hidden, head.detach(), labels, 5, **options).backward()
    assert (largest.elements >= T * V) == holds_all
    assert largest.elements >= 10 * V  # the tile itself was seen, so the watcher works
