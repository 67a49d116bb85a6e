"""flex_attention in the place of block by block code: torch's uncompiled reference of it, on a CPU, with its gradients; and every way of leaving it."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from family_configs import SMALL
from torch._dynamo.testing import CompileCounter
from whole_step import documents, recipe_of, rows_of, sparklab_update, stock_update, worst

from sparklab.engine import attention, blockwise, flex

LENGTHS = (150, 1, 300, 77)
pytestmark = pytest.mark.filterwarnings("ignore")  # torch has opinions on uncompiled flex_attention


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """The reference's gradients work on a CPU too, though torch does not let anybody ask for them."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "DEVICE", "cpu")
    monkeypatch.setattr(flex, "STEP", 128)
    monkeypatch.setattr(flex, "compiled", lambda: torch_flex.flex_attention)
    monkeypatch.setattr(flex, "_decided", {})


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "sparklab.engine.flex"]


def row(kv_heads=2, heads=4, lengths=LENGTHS, width=16):
    torch.manual_seed(0)
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return [torch.randn(1, sum(lengths), count, width).transpose(1, 2).requires_grad_() for count in (heads, kv_heads, kv_heads)], borders


def block_by_block(tensors, borders, window, cap, sinks):
    pieces = zip(*(torch.split(tensor, borders.diff().tolist(), 2) for tensor in tensors), strict=True)
    return torch.cat([blockwise.attend(q, k, v, 0.3, window, cap, sinks) for q, k, v in pieces], 2).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("window", "cap", "sunk"), [(None, 2.0, False), (None, None, True), (40, None, True), (200, 2.0, True), (128, None, False)])
def test_the_same_as_block_by_block(kv_heads, window, cap, sunk):
    tensors, borders = row(kv_heads)
    sinks = torch.randn(4, requires_grad=True) if sunk else None
    leaves = [*tensors, *([sinks] if sunk else [])]
    given = flex.attend(*tensors, borders, 0.3, window, cap, sinks)
    wanted = block_by_block(tensors, borders, window, cap, sinks)
    assert given is not None and given.shape == wanted.shape == (1, sum(LENGTHS), 4, 16)
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)
    up = torch.randn_like(wanted)
    for one, other in zip(torch.autograd.grad(given, leaves, up), torch.autograd.grad(wanted, leaves, up), strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5
    assert list(flex._decided.values()) == [""]


@pytest.mark.parametrize("window", [None, 1, 40, 128, 129, 257, 300])
@pytest.mark.parametrize("lengths", [LENGTHS, (128, 128, 256), (1,), (640,), tuple([7] * 60)])
def test_the_mask_of_blocks(window, lengths):
    """Whole blocks look at all of a block, blocks in part are masked number by number, others see nothing."""
    _, borders = row(lengths=lengths)
    length = -(-sum(lengths) // 128) * 128
    mask = flex.block_mask(borders, length, window, torch.device("cpu"))
    wanted = torch_flex.create_mask(mask.mask_mod, 1, 1, length, length, device="cpu")[0, 0]
    blocks = wanted.view(length // 128, 128, length // 128, 128).transpose(1, 2)
    some, all_of_it = blocks.any((2, 3)), blocks.all((2, 3))
    found = []
    for counts, places in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)):
        chosen = torch.zeros_like(some)
        for line, (count, names) in enumerate(zip(counts[0, 0].tolist(), places[0, 0].tolist(), strict=True)):
            chosen[line, names[:count]] = True
        found.append(chosen)
    partly, whole = found
    assert not (partly & whole).any()
    assert torch.equal(partly | whole, some) and torch.equal(whole, all_of_it)
    token = torch.arange(sum(lengths))
    of = torch.bucketize(token, borders[1:].long(), right=True)
    near = (token[:, None] - token < window) if window is not None else torch.ones_like(wanted[: len(token), : len(token)])
    assert torch.equal(wanted[: len(token), : len(token)], (token[:, None] >= token) & (of[:, None] == of) & near)


def test_compiled_once_a_variant(monkeypatch):
    """Other documents, other masks, rows a little shorter: no new code. Two caps, a window, and a pass without gradients: four."""
    counter = CompileCounter()
    function = torch.compile(torch_flex.flex_attention, dynamic=False, fullgraph=True, backend=counter)
    monkeypatch.setattr(flex, "compiled", lambda: function)
    torch._dynamo.reset()
    for lengths in (LENGTHS, (100, 400, 28), (513,), (640,)):
        tensors, borders = row(lengths=lengths)
        for window, cap in ((None, 2.0), (None, 3.0), (40, 2.0)):
            flex.attend(*tensors, borders, 0.3, window, cap, None)[0, 0].sum().backward()
        with torch.no_grad():
            flex.attend(*tensors, borders, 0.3, None, 2.0, None)
    assert list(flex._decided.values()) == [""] * 4
    assert counter.frame_count == 4
    assert torch._dynamo.config.recompile_limit >= flex.MOST


def through_packed_attention(tensors, borders, **options):
    return attention.packed_attention(torch.nn.Module(), *tensors, scaling=0.3, cu_seq_lens_q=borders, **options)[0]


def test_what_does_not_run_is_left_to_block_by_block_code(monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("out of resource: shared memory, Required: 147456, Hardware limit: 101376\nmore")

    monkeypatch.setattr(flex, "compiled", lambda: broken)
    tensors, borders = row()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            given = through_packed_attention(tensors, borders, softcap=2.0)
    torch.testing.assert_close(given, block_by_block(tensors, borders, None, 2.0, None))
    (said,) = caplog.messages
    assert (
        said
        == "flex_attention does not run here (RuntimeError: out of resource: shared memory, Required: 147456, Hardware limit: 101376); it runs block by block"
    )


def test_what_gives_other_numbers_is_left(monkeypatch, caplog):
    def doubled(*given, **options):
        return 2 * torch_flex.flex_attention(*given, **options)

    monkeypatch.setattr(flex, "compiled", lambda: doubled)
    tensors, borders = row()
    given = through_packed_attention(tensors, borders, softcap=2.0)
    torch.testing.assert_close(given, block_by_block(tensors, borders, None, 2.0, None))
    assert "other numbers here than block by block code, 1 of their size apart" in said(caplog)[0]


def test_a_wrong_gradient_alone_is_found(monkeypatch, caplog):
    def blind(query, *given, **options):
        return torch_flex.flex_attention(query.detach() + 0 * query, *given, **options)

    monkeypatch.setattr(flex, "compiled", lambda: blind)
    tensors, borders = row()
    through_packed_attention(tensors, borders, softcap=2.0)
    assert "other numbers" in said(caplog)[0]


def test_memory_that_runs_out_is_not_a_refusal(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(flex, "compiled", lambda: full)
    tensors, borders = row()
    with pytest.raises(torch.OutOfMemoryError):
        flex.attend(*tensors, borders, 0.3, None, 2.0, None)
    assert not flex._decided


def test_no_more_variants_than_torch_compiles(monkeypatch, caplog):
    monkeypatch.setattr(flex, "MOST", 2)
    for lengths, there in (((100,), True), ((200,), True), ((300,), False), ((90,), True)):
        tensors, borders = row(lengths=lengths)
        assert (flex.attend(*tensors, borders, 0.3, None, 2.0, None) is not None) == there
    assert "compiled for 2 shapes already, and rows of 384 tokens would be one more" in said(caplog)[0]


def test_nothing_is_asked_on_another_device(monkeypatch):
    monkeypatch.setattr(flex, "DEVICE", "cuda")
    monkeypatch.setattr(flex, "_trial", lambda *given: pytest.fail("asked"))
    tensors, borders = row()
    assert flex.attend(*tensors, borders, 0.3, None, 2.0, None) is None


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_whole_updates(family, tmp_path, monkeypatch):
    """With a checkpointed layer, whose count of kept tensors a trial must not disturb."""
    recipe, told = recipe_of(tmp_path / family, SMALL[family]), documents()
    function = torch.compile(torch_flex.flex_attention, dynamic=False, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(flex, "compiled", lambda: function)  # the uncompiled reference itself disturbs it
    flex.DEVICE = "nowhere"
    stock = stock_update(recipe, told)
    flex.DEVICE = "cpu"
    ours = sparklab_update(recipe.replace(checkpoint_layers=1), rows_of(told, True, 1), tmp_path / "run")
    assert set(flex._decided.values()) == {""}
    assert abs(ours.loss / stock.loss - 1) < 1e-6
    assert worst(stock.gradients, ours.gradients)[0] < 1e-5
