"""Each kernel of the fast engine against the library's own module, and what must stay PEFT's: switching off, merging, several adapters, saved files."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from sparklab.engine import attention, blockwise, fast, frozen_mlp, lora, mlp, norm, rotary, rotary_tables
from sparklab.engine.cpu_attention import AttentionPerDocument
from sparklab.engine.loss import chunked_cross_entropy
from sparklab.planner.recipe import Recipe

RECIPE = Recipe(model="small", data="none", rank=4)
SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
    "bos_token_id": 1, "eos_token_id": 2, "attention_bias": True,
}  # fmt: skip


def peft_model(dtype=torch.float32, adapter_dtype=None, **options):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(base, LoraConfig(**settings), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype or dtype)
    return model.train()


def fitted(*arguments, **options):
    model = peft_model(*arguments, **options)
    return model, fast.fit(model, RECIPE)


def run(model, ids=None):
    """Logits and every gradient of a number made of them."""
    model.zero_grad()
    ids = torch.arange(3, 40)[None] if ids is None else ids
    logits = model(input_ids=ids).logits
    (logits.float() ** 2).mean().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def apart(wanted, given):
    assert wanted[1].keys() == given[1].keys() and len(wanted[1]) == 28
    return max(float((given[1][name].float() - gradient.float()).norm() / gradient.float().norm()) for name, gradient in wanted[1].items())


def test_all_layers_are_taken_and_grouped():
    model, left = fitted()
    layers = [module for module in model.modules() if isinstance(module, lora.Lora)]
    assert (len(layers), left) == (14, ())
    block = model.get_base_model().model.layers[0]
    assert block.self_attn.q_proj.fast_together.members == (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
    assert isinstance(block.mlp, mlp.GatedMLP) and isinstance(block.input_layernorm, norm.RMSNorm)
    assert type(block.self_attn) is not LlamaAttention and isinstance(block.self_attn, LlamaAttention)


@pytest.mark.parametrize(("dtype", "adapters", "bound"), [(torch.float32, None, 1e-5), (torch.bfloat16, None, 0.04), (torch.bfloat16, torch.float32, 0.04)])
def test_a_model_computes_what_peft_does(dtype, adapters, bound):
    stock, (ours, _) = run(peft_model(dtype, adapters)), fitted(dtype, adapters)
    given = run(ours)
    assert apart(stock, given) < bound
    assert all(gradient.dtype == (adapters or dtype) for gradient in given[1].values())
    torch.testing.assert_close(given[0], stock[0], rtol=bound, atol=bound * float(stock[0].float().abs().max()))


def test_bf16_is_no_further_from_the_truth_than_peft():
    """Against fp32 with the same numbers; summed over all gradients our errors are at most a tenth larger."""
    exact = peft_model(torch.bfloat16).float()
    truth, stock, (ours, _) = run(exact)[1], run(peft_model(torch.bfloat16))[1], fitted(torch.bfloat16)
    given = run(ours)[1]

    def error(gradients):
        return sum(float((gradients[name].float() - wanted).norm() / wanted.norm()) for name, wanted in truth.items())

    assert error(given) < 1.1 * error(stock)


def test_what_is_peft_s_stays_peft_s(tmp_path):
    stock, (ours, _) = peft_model(), fitted()
    assert list(stock.state_dict()) == list(ours.state_dict())
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        with stock.disable_adapter(), ours.disable_adapter():
            torch.testing.assert_close(ours(input_ids=ids).logits, stock(input_ids=ids).logits)
        tuned = ours(input_ids=ids).logits
        for model in (stock, ours):
            model.merge_adapter()
        torch.testing.assert_close(ours(input_ids=ids).logits, stock(input_ids=ids).logits)
        ours.unmerge_adapter()
        torch.testing.assert_close(ours(input_ids=ids).logits, tuned, rtol=1e-4, atol=1e-5)
        for model in (stock, ours):
            if model is stock:
                model.unmerge_adapter()
            torch.manual_seed(5)
            model.add_adapter("second", LoraConfig(r=2, lora_alpha=2, target_modules="all-linear", init_lora_weights=False))
            model.base_model.set_adapter(["default", "second"])
        torch.testing.assert_close(ours(input_ids=ids).logits, stock(input_ids=ids).logits)
        for model in (stock, ours):
            model.set_adapter("second")
        torch.testing.assert_close(ours(input_ids=ids).logits, stock(input_ids=ids).logits)
    ours.save_pretrained(tmp_path)
    torch.testing.assert_close(ours.merge_and_unload()(input_ids=ids).logits, stock.merge_and_unload()(input_ids=ids).logits)
    assert {file.name for file in (tmp_path / "second").iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}


@pytest.mark.parametrize(("options", "word"), [({"lora_dropout": 0.3}, "dropout"), ({"use_dora": True}, "DoRA")])
def test_what_is_not_plain_is_peft_s_own_and_said(options, word):
    torch.manual_seed(7)
    stock, (ours, left) = peft_model(**options), fitted(**options)
    assert len(left) == 1 and word in left[0] and "14 linear layers" in left[0]
    answers = []
    for model in (stock, ours):
        torch.manual_seed(8)
        answers.append(model(input_ids=torch.arange(3, 40)[None]).logits)
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-4, atol=1e-5)


def test_x_is_kept_once_and_nothing_else_is_wide():
    """Layers that share x keep it once, with the low-rank tensor; no copy, no cast."""
    model, _ = fitted(torch.bfloat16, torch.float32)
    block = model.get_base_model().model.layers[0].self_attn
    x = torch.randn(1, 50, 64, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        outs = [layer(x) for layer in (block.q_proj, block.k_proj, block.v_proj)]
    activations = [tensor for tensor in kept if tensor.shape[0] == 50 or tensor.data_ptr() == x.data_ptr()]
    assert [tuple(tensor.shape) for tensor in activations] == [(1, 50, 64), (50, 12)]
    assert activations[0].data_ptr() == x.data_ptr()
    assert outs[0].shape == (1, 50, 64) and outs[1].shape == (1, 50, 32)


def test_a_layer_called_alone_or_with_another_x_is_right():
    model, _ = fitted()
    attention_block = model.get_base_model().model.layers[0].self_attn
    stock = peft_model().get_base_model().model.layers[0].self_attn
    x, y = torch.randn(2, 5, 64).split(1)
    for name, given in (("k_proj", x), ("q_proj", x), ("v_proj", y), ("k_proj", x), ("q_proj", y), ("q_proj", x), ("v_proj", x)):
        torch.testing.assert_close(getattr(attention_block, name)(given), getattr(stock, name)(given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("double", [True, False])
def test_evaluating_first_does_not_change_what_4_bits_learn(tmp_path, double):
    """bitsandbytes repacks a CPU's weights at the first pass without gradients; see facts of its Linear4bit."""
    from sparklab.box import Box
    from sparklab.model.blank import blank_base

    LlamaConfig(**SHAPE).save_pretrained(tmp_path)
    recipe = Recipe(model=str(tmp_path), data="none", method="qlora", dtype="fp32", rank=4, double_quantization=double)
    box = Box(name="test", chip="CPU", memory_bytes=2**35, unified=False, is_gpu=False)
    found = []
    for engine, first in (("stock", False), ("fast", False), ("fast", True)):
        torch.manual_seed(3)
        model = fast.ready_model(recipe.replace(engine=engine), box, blank_base)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if first:
            with torch.no_grad():
                model.eval()(input_ids=torch.arange(3, 9)[None], cu_seq_lens_q=torch.tensor([0, 6], dtype=torch.int32))
        ids = torch.arange(3, 40)[None]
        logits = model.train()(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 37], dtype=torch.int32)).logits
        (logits**2).mean().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None})
    for name, gradient in found[0].items():
        assert float((found[1][name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name  # 1e-5 holds them over whole updates, in test_whole_step
        assert torch.equal(found[1][name], found[2][name]), name


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_gated_mlp(act):
    block = LlamaMLP(LlamaConfig(**{**SHAPE, "hidden_act": act}))
    assert mlp.gate_of(block.act_fn) is not None
    assert fast._is_gated(LlamaMLP.forward) and not fast._is_gated(Phi3MLP.forward)
    gate = mlp.gate_of(block.act_fn)
    x, upper = torch.randn(7, 5, requires_grad=True), torch.randn(7, 5)
    block.act_fn(x).backward(upper)
    torch.testing.assert_close(gate.backward(upper, x.detach(), torch.empty_like(upper)), x.grad)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_a_frozen_mlp_keeps_gate_and_up_alone(act):
    torch.manual_seed(0)
    stock, ours = (LlamaMLP(LlamaConfig(**{**SHAPE, "hidden_act": act, "mlp_bias": True})).requires_grad_(False) for _ in range(2))
    ours.load_state_dict(stock.state_dict())
    fast._fit_frozen(torch.nn.ModuleList([ours]), lora.Buffer())
    assert isinstance(ours, frozen_mlp.FrozenMLP) and isinstance(ours, LlamaMLP)
    x, up = torch.randn(2, 2, 9, 64).unbind()
    found, kept = [], []
    for module in (stock, ours):
        given = x.clone().requires_grad_()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
            out = module(given)
        out.backward(up)
        found.append((out.detach(), given.grad))
    for wanted, given in zip(*found, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-6)
    inner = stock.gate_proj.out_features
    assert [tuple(tensor.shape) for tensor in kept] == [(18, inner), (18, inner)]
    ours.up_proj.weight.requires_grad_(True)  # learns: transformers' own pass, whose weight has a gradient
    ours(x).sum().backward()
    assert ours.up_proj.weight.grad is not None
    ours.up_proj = torch.nn.Linear(64, inner).requires_grad_(False)  # another layer: the one that was taken over is not asked
    stock.up_proj = ours.up_proj
    torch.testing.assert_close(ours(x), stock(x))


def test_other_activations_are_left_alone():
    assert mlp.gate_of(torch.nn.ReLU()) is None


@pytest.mark.parametrize(("kind", "spelling"), [(LlamaRMSNorm, "llama"), (Olmo2RMSNorm, "olmo"), (GemmaRMSNorm, "gemma")])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_norms(kind, spelling, dtype, bound, monkeypatch):
    monkeypatch.setattr(norm, "NORM_BLOCK", 200)  # several blocks
    torch.manual_seed(0)
    assert norm.spelling(kind) == spelling
    stock, ours = kind(48, eps=1e-5).to(dtype), kind(48, eps=1e-5).to(dtype)
    stock.weight.data.normal_()
    ours.load_state_dict(stock.state_dict())
    fast._fit_block(ours)
    assert isinstance(ours, norm.RMSNorm) and isinstance(ours, kind)
    x = torch.randn(2, 9, 48, dtype=dtype)
    found = []
    for module in (stock, ours):
        given = x.clone().requires_grad_()
        out = module(given)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out))
        found.append((out.detach(), given.grad, module.weight.grad))
    for wanted, given in zip(*found, strict=True):
        assert float((given.float() - wanted.float()).norm() / wanted.float().norm()) < bound
    assert found[0][0].dtype == found[1][0].dtype == dtype
    if dtype is torch.float32:
        torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=1e-6)


def test_a_norm_of_another_text_is_left_alone():
    class Doubled(LlamaRMSNorm):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    assert norm.spelling(Doubled) is None and norm.spelling(torch.nn.LayerNorm) is None


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_rotary(dtype, bound):
    torch.manual_seed(0)
    angles = torch.randn(1, 9, 8).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    found = []
    q, k, up = (torch.randn(1, 9, heads, 16, dtype=dtype).transpose(1, 2) for heads in (4, 2, 4))
    for turn in (apply_rotary_pos_emb, rotary.apply):
        a, b = q.clone().requires_grad_(), k.clone().requires_grad_()
        turned_q, turned_k = turn(a, b, cos, sin)
        (turned_q * up).sum().backward()
        turned_k.sum().backward()
        found.append((turned_q.detach(), turned_k.detach(), a.grad, b.grad))
    for wanted, given in zip(*found, strict=True):
        assert float((given.float() - wanted.float()).norm() / wanted.float().norm()) < bound
    assert rotary.with_our_turn(LlamaAttention.forward) is not None
    assert rotary.with_our_turn(LlamaMLP.forward) is None


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_of_documents(kv_heads):
    lengths = [5, 1, 30, 17]
    torch.manual_seed(0)
    whole = [torch.randn(1, sum(lengths), heads, 16).transpose(1, 2).requires_grad_() for heads in (4, kv_heads, kv_heads)]
    outs = []
    for q, k, v in zip(*(torch.split(tensor, lengths, 2) for tensor in whole), strict=True):
        outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2))
    wanted = torch.cat(outs, 1)
    up = torch.randn_like(wanted)
    gradients = torch.autograd.grad(wanted, whole, up)
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    given, _ = attention.packed_attention(torch.nn.Module(), *whole, scaling=0.3, cu_seq_lens_q=borders)
    torch.testing.assert_close(given, wanted)
    for one, other in zip(torch.autograd.grad(given, whole, up), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


TWICE = {
    "linear": lambda x: lora.apply(x, [lora.Adapters(lora.Frozen(torch.nn.Linear(8, 8).requires_grad_(False), lora.Buffer()), x[:2], x[:, :2], 1.0)])[0],
    "norm": lambda x: norm._RMSNorm.apply(x, x[0], 1e-6, "llama"),
    "turn": lambda x: rotary.apply(x[None, None], x[None, None], x[None], x[None])[0],
    "a document": lambda x: AttentionPerDocument.apply(x[None, None], x[None, None], x[None, None], [8], 1.0),
    "block by block": lambda x: blockwise.attend(x[None, None], x[None, None], x[None, None], 1.0, None, None, None),
    "loss": lambda x: chunked_cross_entropy(x, x, torch.arange(8), 1.0),
}


@pytest.mark.parametrize("kernel", TWICE)
def test_a_second_derivative_is_refused(kernel):
    """Some would be wrong without a word: what the forward pass keeps has no graph."""
    x = torch.randn(8, 8, requires_grad=True)
    (first,) = torch.autograd.grad(TWICE[kernel](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


PACES = {
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "original_max_position_embeddings": 16, "factor": 2.0},
    "dynamic": {"factor": 4.0},
}


@pytest.mark.parametrize("kind", PACES)
def test_a_text_turns_at_its_own_pace_whatever_is_asked_beside_it(kind):
    positions = 16 if kind == "dynamic" else 64
    rope = {"rope_type": kind, "rope_theta": 1e4, **PACES[kind]}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=positions, rope_parameters=rope)
    model = torch.nn.ModuleList([LlamaRotaryEmbedding(config)])
    rotary_tables.by_document(model)
    batch = torch.stack([torch.arange(count).clamp(max=last) for count, last in ((40, 39), (40, 4), (40, 29))])
    whole = model[0](torch.zeros(()), batch)
    paces = set()
    for number, positions in enumerate(batch):
        alone = LlamaRotaryEmbedding(config)(torch.zeros(()), positions[None])
        assert all(torch.equal(given[number], wanted[0]) for given, wanted in zip(whole, alone, strict=True))
        paces.add(round(float(alone[1][0, 4, 3]), 5))
    assert len(paces) == (2 if kind == "longrope" else 3)


def test_reading_what_is_called_together():
    assert ("q_proj", "k_proj", "v_proj") in fast.read_together(LlamaAttention.forward)

    def forward(self, x):
        x = self.first(x)
        return self.second(x) + self.third(x) + self.third(x)

    assert fast.read_together(forward) == ()


def test_stock_is_stock():
    model = peft_model()
    kinds = [type(module) for module in model.modules()]
    assert fast.fit(model, RECIPE.replace(engine="stock")) == ()
    assert [type(module) for module in model.modules()] == kinds
