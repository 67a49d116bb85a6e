"""Long documents by cuDNN: rows are split, filled up and joined on a CPU with its own attention in the place of both kernels; and every way of leaving it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sparklab.engine import attention, cudnn

CALLS: list[tuple[int, ...]] = []
LENGTHS = (5, 40, 3, 7, 16, 33, 2)
TYPES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def one_by_one(q, k, v, lengths, scale):
    """The documents of [1, tokens, heads, D] alone."""
    split = zip(*(torch.split(tensor.transpose(1, 2), lengths, 2) for tensor in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=True) for part in split], 2).transpose(1, 2)


def lengths_of(part, q):
    assert q.shape[:2] == (1, part.filled)
    if part.borders is None:
        CALLS.append((part.filled,))
        return [part.filled]
    CALLS.append(tuple(part.borders.diff().tolist()))
    assert part.borders[0] == 0 and part.borders[-1] == part.tokens == part.filled and max(CALLS[-1]) == part.longest
    return part.borders.diff().tolist()


def forward_of(q, k, v, part, scale):
    made = one_by_one(q, k, v, lengths_of(part, q), scale)
    return made, made.new_tensor(float(part.start)), None, None, None, None


def backward_of(grad, q, k, v, out, told, *_):
    *_, part, scale = _
    assert told == part.start and grad.is_contiguous() and grad.shape == out.shape == q.shape
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        again = one_by_one(*leaves, lengths_of(part, q), scale)
        torch.testing.assert_close(again[:, : part.tokens], out[:, : part.tokens])
        return torch.autograd.grad(again, leaves, grad)


def plain(q, k, v, borders, longest, scale, window):
    assert window is None and longest == max(borders.diff().tolist())
    return one_by_one(*(tensor.transpose(1, 2) for tensor in (q, k, v)), borders.diff().tolist(), scale)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    for name, value in {"DEVICE": "cpu", "LEAST": 16, "STEP": 8, "LONG": 32, "BOUND": TYPES, "decided": {}, "forward_of": forward_of,
                        "backward_of": backward_of}.items():  # fmt: skip
        monkeypatch.setattr(cudnn, name, value)
    times = iter(range(1, 1000))  # each later call is slower: ours is asked first
    monkeypatch.setattr(cudnn, "timed", lambda function: function() and next(times))
    CALLS.clear()


def row(lengths, kv_heads=2, dtype=torch.float32, laid="tokens"):
    torch.manual_seed(0)
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    made = [torch.randn(1, sum(lengths), heads, 8, dtype=dtype).transpose(1, 2) for heads in (4, kv_heads, kv_heads)]
    return [(tensor.contiguous() if laid == "heads" else tensor).requires_grad_() for tensor in made], borders


def attend(tensors, borders, scale=0.3):
    return cudnn.attend(*tensors, borders, borders.diff().tolist(), scale, plain)


def alike(given, wanted, leaves, dtype):
    assert given.shape == wanted.shape and given.is_contiguous()
    up = torch.randn_like(wanted)
    found = [given.detach(), *torch.autograd.grad(given, leaves, up)], [wanted.detach(), *torch.autograd.grad(wanted, leaves, up)]
    for one, other in zip(*found, strict=True):
        assert float((one - other).float().norm() / other.float().norm()) <= TYPES[dtype] and one.shape == other.shape


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("laid", ["tokens", "heads"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [LENGTHS, (16,), (17,), (40, 40), (1, 16), (16, 1), (3, 30), (33, 1, 1, 33)])
def test_a_row_is_its_documents(lengths, kv_heads, laid, dtype):
    tensors, borders = row(lengths, kv_heads, dtype, laid)
    given = attend(tensors, borders)
    alike(given, plain(*tensors, borders, max(lengths), 0.3, None), tensors, dtype)
    assert all(verdict.used for verdict in cudnn.decided.values())
    assert {kind.long for kind in cudnn.decided} == {length >= 32 for length in lengths if length >= 16}


def test_long_documents_go_alone_and_short_ones_together():
    tensors, borders = row(LENGTHS)
    attend(tensors, borders)
    tried = len(CALLS)
    assert tried and {kind.long for kind in cudnn.decided} == {False, True}
    attend(tensors, borders)  # the next layer of the row: no trial, and the row's stretches are those of before
    assert CALLS[tried:] == [(5,), (40,), (3, 7), (16,), (40,), (2,)] == CALLS[tried - 6 : tried]
    assert len(borders.sparklab_stretches) == 1


def test_attention_of_a_row_asks_for_it_unless_the_row_is_being_recorded():
    """In a recording the borders stand for any row's, and only flash attention reads those on the device."""
    tensors, borders = row(LENGTHS)
    alike(attention.packed_attention(torch.nn.Module(), *tensors, cu_seq_lens_q=borders, scaling=0.3)[0], plain(*tensors, borders, 40, 0.3, None),
          tensors, torch.float32)  # fmt: skip
    assert CALLS and cudnn.decided
    CALLS.clear()
    setattr(borders, attention.RECORDED, borders)
    attention.packed_attention(torch.nn.Module(), *tensors, cu_seq_lens_q=borders)
    attention.packed_attention(torch.nn.Module(), *tensors, cu_seq_lens_q=row(LENGTHS)[1], sliding_window=39)
    assert not CALLS


def test_one_document_as_long_as_the_row_is_not_copied(monkeypatch):
    tensors, borders = row((48,))
    attend(tensors, borders)
    seen = []
    monkeypatch.setattr(cudnn, "forward_of", lambda q, k, v, *rest: seen.append([t.data_ptr() for t in (q, k, v)]) or forward_of(q, k, v, *rest))
    monkeypatch.setattr(F, "pad", None)
    given = attend(tensors, borders)
    assert seen == [[tensor.data_ptr() for tensor in tensors]]
    torch.autograd.grad(given, tensors, torch.ones_like(given))


def test_what_follows_a_document_fills_it_up(monkeypatch):
    """No copy but at the row's end, and nothing of a neighbour comes in, however large."""
    tensors, borders = row((17, 20))
    attend(tensors, borders)
    pads, real = [], F.pad
    monkeypatch.setattr(F, "pad", lambda tensor, *rest: pads.append(tuple(tensor.shape)) or real(tensor, *rest))
    before = attend(tensors, borders)[:, :17]
    assert pads == [(20, 4, 8), (20, 2, 8), (20, 2, 8)]
    with torch.no_grad():
        for tensor in tensors:
            tensor[:, :, 17:] *= 1e4
    after = attend(tensors, borders)
    assert torch.equal(before, after[:, :17])
    grads = torch.autograd.grad(after[:, :17].sum(), tensors)
    assert all(not grad[:, :, 17:].any() and grad[:, :, :17].isfinite().all() for grad in grads)


def test_a_document_looks_the_same_in_every_row(monkeypatch):
    """cuDNN prepares each shape and all strides once: the row's length must not be in them, forward or backward."""
    seen = []
    monkeypatch.setattr(cudnn, "forward_of", lambda *given: seen.append([tensor.stride() for tensor in given[:3]]) or forward_of(*given))
    monkeypatch.setattr(cudnn, "backward_of", lambda *given: seen.append([tensor.stride() for tensor in given[:5]]) or backward_of(*given))
    cudnn.decided[cudnn.Kind(4, 2, 8, torch.float32, False)] = cudnn.Verdict(True, "")
    for lengths in ((24,), (24, 1), (24, 9), (20, 4), (24, 24), (23,)):
        tensors, borders = row(lengths)
        out = attend(tensors, borders)
        torch.autograd.grad(out.sum(), tensors)
    whole = [strides for strides in seen if strides[0][0] == 24 * 4 * 8]
    wide, narrow = (768, 32, 8, 1), (384, 16, 8, 1)
    assert len(whole) == 14 and {tuple(strides) for strides in whole} == {(wide, narrow, narrow), (wide, wide, narrow, narrow, wide)}


@pytest.mark.parametrize("why", ["slow", "wrong", "broken", "short", "type", "capture"])
def test_where_it_is_not_to_be_had_flash_attention_stays(why, monkeypatch, caplog):
    tensors, borders = row((10, 15) if why == "short" else LENGTHS, dtype=torch.float64 if why == "type" else torch.float32)
    if why == "slow":
        monkeypatch.setattr(cudnn, "timed", lambda function: 1.0)
    if why == "wrong":
        monkeypatch.setattr(cudnn, "backward_of", lambda *given: tuple(1.01 * made for made in backward_of(*given)))
    if why == "broken":
        monkeypatch.setattr(cudnn, "forward_of", lambda *given: torch.ones(2) @ torch.ones(3))
    if why == "capture":
        monkeypatch.setattr(cudnn, "DEVICE", "cuda")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        kind = cudnn.Kind(4, 2, 8, torch.float32, False)
        assert not cudnn._is_used(kind, tensors, 0.3, plain)  # nothing is tried, and nothing is decided
        cudnn.decided[kind] = cudnn.Verdict(True, "")
        assert cudnn._is_used(kind, tensors, 0.3, plain) and list(cudnn.decided) == [kind]
        return
    assert attend(tensors, borders) is None and attend(tensors, borders) is None
    tried = why in ("slow", "wrong", "broken")
    assert len(cudnn.decided) == (2 if tried else 0) and not any(verdict.used for verdict in cudnn.decided.values())
    assert not caplog.records and torch.isfinite(attention.packed_attention(torch.nn.Module(), *tensors, cu_seq_lens_q=borders)[0]).all()


def test_a_trial_leaves_no_trace():
    """Neither in a checkpointed layer's own list of what is kept, nor in the state of random numbers, nor where no gradients are wanted at all."""
    tensors, borders = row(LENGTHS)
    state = torch.get_rng_state()
    with torch.inference_mode():
        asked = [tensor.detach().clone() for tensor in tensors]
        inferred = attend(asked, copy.copy(borders))
    assert torch.equal(state, torch.get_rng_state())
    cudnn.decided.clear()
    again = checkpoint(lambda *given: attend(given, copy.copy(borders)) * 2, *tensors, use_reentrant=False)
    assert torch.equal(again, 2 * inferred)
    alike(again, 2 * plain(*tensors, borders, max(LENGTHS), 0.3, None), tensors, torch.float32)


def test_torch_s_kernels_are_called_in_their_own_words(monkeypatch):
    """On tensors without numbers, which torch's own account of these kernels takes as CUDA would."""
    monkeypatch.undo()
    q, k, v = (torch.empty(1, 512, heads, 64, dtype=torch.bfloat16, device="meta") for heads in (8, 2, 2))
    borders = torch.tensor([0, 200, 512], dtype=torch.int32, device="meta")
    for part in (cudnn.Stretch(0, 500, 512), cudnn.Stretch(0, 512, 512, borders, 312)):
        out, *told = cudnn.forward_of(q, k, v, part, 0.125)
        assert out.shape == q.shape and out.is_contiguous() and len(told) == 5 and told[0].dtype == torch.float32
        made = cudnn.backward_of(torch.empty_like(out), q, k, v, out, *told, part, 0.125)
        assert [(tuple(grad.shape), grad.is_contiguous()) for grad in made] == [(tuple(tensor.shape), True) for tensor in (q, k, v)]
