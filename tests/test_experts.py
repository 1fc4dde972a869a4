"""Stacked experts of transformers' families: taken apart, compressed, saved, loaded."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch

import pyllmq
from pyllmq.compression.jobs.in_memory import bits_for_size, visit_groups
from pyllmq.compression.statistics.inputs import PRIOR_TOKENS
from pyllmq.experts import RoutedExperts, put_together, take_apart

from .test_new_format import in_a_new_process

pytestmark = pytest.mark.transformers

SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "num_experts_per_tok": 2}  # fmt: skip
GROUPS = {"n_routed_experts": 8, "moe_intermediate_size": 48, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
FAMILIES = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 96},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 16},
    "Olmoe": {"num_experts": 4},
    "DeepseekV3": {**GROUPS, **LATENT, "num_key_value_heads": 4},
    "GptOss": {"num_local_experts": 4, "head_dim": 16, "sliding_window": 8},
    "GraniteMoe": {"num_local_experts": 4},
    "Glm4Moe": {**GROUPS, "head_dim": 16},
    "Phimoe": {"num_local_experts": 4},
    "Jamba": {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_d_state": 8,
              "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 8},
}  # fmt: skip


def make(family, **changes):
    import transformers

    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES[family] | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):  # GPT-OSS's begin as zeros
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 24).view(3, 7)).logits


def expert_layers(model):
    return [module for module in model.modules() if isinstance(module, RoutedExperts)]


@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_saved_and_loaded(family, tmp_path):
    model = make(family)
    dense = logits(model)
    take_apart(model)
    torch.testing.assert_close(logits(model), dense, rtol=1e-5, atol=1e-6)
    put_together(model)
    assert not expert_layers(model) and torch.equal(logits(model), dense)
    report = pyllmq.compress(model, pyllmq.KMeansConfig(6), progress=False)
    experts = [layer for layer in report.layers if ".experts." in layer.name]
    assert len(experts) == 2 * sum(layer.experts for layer in expert_layers(model)) > 0
    assert not any("experts" in item.name for item in report.left_dense)
    assert not any(parameter.dim() == 3 and "experts" in name for name, parameter in model.named_parameters())
    packed = logits(model)
    assert 0 < float((packed - dense).norm() / dense.norm()) < 0.05
    pyllmq.save_pretrained(model, tmp_path / "packed")
    again = pyllmq.from_pretrained(tmp_path / "packed", fuse=False)
    assert torch.equal(logits(again), packed)
    pyllmq.save_pretrained(again, tmp_path / "again")
    files = [tmp_path / name / "model.safetensors" for name in ("packed", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "family", ["GptOss", *(pytest.param(family, marks=pytest.mark.slow) for family in ("Mixtral", "DeepseekV3"))]
)
def test_calibrated_and_block_by_block_alike(family, tmp_path):
    model = make(family)
    model.save_pretrained(tmp_path / "dense")
    batches = [torch.randint(0, 128, (4, 24)) for _ in range(3)]
    config = pyllmq.ColumnCodebookConfig.preset("fast", 4.0)
    report = pyllmq.compress_folder(tmp_path / "dense", tmp_path / "packed", config, batches, progress=False)
    in_memory = pyllmq.compress(model, config, batches, progress=False)
    assert [layer.name for layer in report.layers] == [layer.name for layer in in_memory.layers]
    assert torch.equal(logits(pyllmq.from_pretrained(tmp_path / "packed", fuse=False)), logits(model))


@pytest.mark.parametrize(
    "config",
    [
        pyllmq.CLAQConfig(bits=4),
        pyllmq.SparseConfig(method="wanda", pattern="2:4"),
        pyllmq.SparseConfig(method="sparsegpt", pattern="2:4", quantize=pyllmq.CLAQConfig(bits=4)),
        pyllmq.SparseConfig(method="magnitude", sparsity=0.5),
    ],
    ids=["claq", "2:4", "2:4 of codes", "bitmap"],
)
def test_other_formats(config, tmp_path):
    model = make("Qwen3Moe", num_hidden_layers=1)
    batches = [torch.randint(0, 128, (4, 24)) for _ in range(2)]
    pyllmq.compress(model, config, batches, progress=False)
    assert expert_layers(model)[0].packed_stacks() == []
    pyllmq.save_pretrained(model, tmp_path / "packed")
    assert torch.equal(logits(pyllmq.from_pretrained(tmp_path / "packed", fuse=False)), logits(model))


@pytest.mark.parametrize("family", [pytest.param("Mixtral", marks=pytest.mark.slow), "GptOss"])
def test_by_weights_alone_block_by_block(family, tmp_path, monkeypatch):
    from pyllmq.compression.jobs import folder
    from pyllmq.compression.jobs.files import compress_files

    model = make(family)
    model.save_pretrained(tmp_path / "dense")
    config, ends = pyllmq.KMeansConfig(4), {"embeddings": 8, "head": 8}
    report = compress_files(tmp_path / "dense", tmp_path / "packed", config, **ends, progress=False)
    in_memory = pyllmq.compress(model, config, progress=False, **ends)
    assert {layer.name for layer in report.layers} == {layer.name for layer in in_memory.layers}
    assert not report.warnings and all("router" in i.name or "gate" in i.name for i in report.left_dense if not i.asked)
    assert torch.equal(logits(pyllmq.from_pretrained(tmp_path / "packed", fuse=False)), logits(model))

    def ended(self, unit, entry, write=folder.FolderJob._write):
        if len(self.manifest.finished) == 2:
            raise KeyboardInterrupt
        write(self, unit, entry)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(folder.FolderJob, "_write", ended)
        compress_files(tmp_path / "dense", tmp_path / "again", config, **ends, progress=False)
    with pytest.warns(UserWarning, match="workers=2 is not used: .* experts that transformers stacks"):
        resumed = compress_files(
            tmp_path / "dense", tmp_path / "again", config, **ends, resume=True, workers=2, progress=False
        )
    assert [layer.name for layer in resumed.layers] == [layer.name for layer in report.layers]
    for file in (tmp_path / "packed").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_swap_linear_packs_stacks():
    model = make("Qwen3Moe")
    before, experts = logits(model), model.model.layers[0].mlp.experts

    def fail(linear):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        pyllmq.swap_linear(model, fail)
    assert model.model.layers[0].mlp.experts is experts and torch.equal(logits(model), before)
    swapped = pyllmq.swap_linear(model, lambda linear: pyllmq.CodebookLinear.from_dense(linear, bits=6))
    assert "model.layers.1.mlp.experts.expert_3_down" in swapped
    assert not any(parameter.dim() == 3 for parameter in model.parameters())
    assert 0 < float((logits(model) - before).norm() / before.norm()) < 0.05
    other = make("Qwen3Moe")
    kept = pyllmq.swap_linear(
        other, lambda linear: pyllmq.CodebookLinear.from_dense(linear, bits=6), exclude=["experts"]
    )
    assert not any("experts" in name for name in kept) and not expert_layers(other)


def test_statistics_of_an_expert_are_shrunk_to_those_of_its_layer():
    model = make("Qwen3Moe").double()
    batches = [torch.randint(0, 128, (3, 24)) for _ in range(2)]
    take_apart(model)
    layer = expert_layers(model)[0]
    inputs = {name: [] for name, _ in layer.named_children()}
    handles = [c.register_forward_pre_hook(lambda _, x, n=n: inputs[n].append(x[0])) for n, c in layer.named_children()]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    found = {}
    visit_groups(model, batches, lambda group, inputs: found.update(dict.fromkeys(group, inputs)))
    for part, size in (("up", 64), ("down", 48)):
        names = [f"expert_{e}_{part}" for e in range(4)]
        of_each = {name: torch.cat(inputs[name]) if inputs[name] else torch.empty(0, size) for name in names}
        pool = torch.cat(list(of_each.values()))
        pooled = pool.T @ pool / len(pool)
        for name, x in of_each.items():
            expected = 2 * (x.T @ x + PRIOR_TOKENS * size * pooled) / (len(x) + PRIOR_TOKENS * size)
            got = found[f"model.layers.0.mlp.experts.{name}"]
            torch.testing.assert_close(got.hessian.double(), expected.double(), rtol=1e-4, atol=1e-6)
            assert got.reached == bool(len(x))


def test_an_expert_that_loses_its_tokens_on_the_way_takes_the_statistics_of_its_layer():
    model, found = make("Qwen3Moe", num_experts=6, num_hidden_layers=1), {}
    gate = model.model.layers[0].mlp.gate.weight.data

    def visit(group, inputs):
        found.update(dict.fromkeys(group, inputs))
        if any(name.endswith("o_proj") for name in group):  # from now on never experts 4 and 5
            gate.copy_(torch.tensor([1.0, 0.5, -1.0, -0.5, 0.0, 0.0])[:, None] * gate[:1])

    visit_groups(model, [torch.randint(0, 128, (4, 24))], visit)
    lost = [f"model.layers.0.mlp.experts.expert_{e}_{part}" for e in (4, 5) for part in ("up", "down")]
    assert {name for name, inputs in found.items() if not inputs.reached} == set(lost)
    for part in (0, 1):
        assert torch.equal(found[lost[part]].hessian, found[lost[part + 2]].hessian)
        assert float(found[lost[part]].hessian.diagonal().sum()) > 0


def test_padding_is_no_expert_s():
    ids = torch.randint(0, 128, (3, 24))
    mask = torch.ones_like(ids)
    mask[0, 10:] = mask[2, 17:] = 0
    found = []
    short = [{"input_ids": row[: int(of.sum())][None]} for row, of in zip(ids, mask, strict=True)]
    for batches in (short, [{"input_ids": ids, "attention_mask": mask}]):
        seen = {}
        visit_groups(
            make("Qwen3Moe"), batches, lambda group, inputs, seen=seen: seen.update(dict.fromkeys(group, inputs))
        )
        found.append(seen)
    assert found[0].keys() == found[1].keys() and any(".experts." in name for name in found[0])
    for name, inputs in found[0].items():
        torch.testing.assert_close(found[1][name].hessian, inputs.hessian, rtol=1e-4, atol=1e-5)
        assert found[1][name].reached == inputs.reached


def test_an_expert_without_tokens_takes_the_statistics_of_its_layer():
    model = make("Mixtral", num_local_experts=6)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[:3] *= 100
        layer.mlp.gate.weight.data[3:] = 0
    stack = model.model.layers[0].mlp.experts
    found = {}
    visit_groups(
        model, [torch.randint(0, 128, (1, 2))], lambda group, inputs: found.update(dict.fromkeys(group, inputs))
    )
    assert model.model.layers[0].mlp.experts is stack
    unreached = [inputs for name, inputs in found.items() if ".experts." in name and not inputs.reached]
    assert unreached
    for inputs in unreached:
        assert not torch.equal(inputs.hessian, torch.eye(len(inputs.hessian))) and bool(
            inputs.hessian.diagonal().sum() > 0
        )


def test_only_the_experts_that_tokens_were_sent_to_run():
    layer = RoutedExperts(make("Qwen3Moe").model.layers[0].mlp.experts)
    ran = []
    for name, child in layer.named_children():
        child.register_forward_hook(lambda *_, name=name: ran.append(name))
    x = torch.randn(3, 64)
    index, weights = torch.tensor([[1, 3], [3, 4], [3, 1]]), torch.rand(3, 2)  # 4, one past the last: none
    out = layer(x, index, weights)
    assert ran == ["expert_1_up", "expert_1_down", "expert_3_up", "expert_3_down"]
    expected = torch.zeros(3, 64, dtype=torch.float64)
    for token in range(3):
        for place in range(2):
            if (e := int(index[token, place])) < 4:
                gate, up = (layer._parameters["gate_up_proj"][e].double() @ x[token].double()).chunk(2)
                hidden = torch.nn.functional.silu(gate) * up
                expected[token] += weights[token, place] * (layer._parameters["down_proj"][e].double() @ hidden)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-6)
    assert layer(x[:0], index[:0], weights[:0]).shape == (0, 64)
    for bad in (-1, 5):
        with pytest.raises(IndexError, match=f"sent to expert {bad}; allowed: 0 to 3"):
            layer(x, torch.full((3, 2), bad), weights)


def test_experts_that_no_token_reaches_are_named():
    model = make("Mixtral", num_local_experts=6)
    for layer in model.model.layers:  # never expert 5
        layer.mlp.gate.weight.data[5] = layer.mlp.gate.weight.data[4]
        layer.mlp.gate.weight.data[4:] *= 0
        layer.mlp.gate.weight.data[:4] *= 100
    batches = [torch.randint(0, 128, (1, 2))]
    with pytest.warns(UserWarning, match="experts.expert_. was never run|experts.expert_._up was never run"):
        report = pyllmq.compress(model, pyllmq.CLAQConfig(bits=4), batches, progress=False)
    assert sum("never run by the calibration data" in warning for warning in report.warnings) >= 4
    assert all("no token was routed to this expert" in said for said in report.warnings if "never run" in said)


def test_a_failed_job_leaves_the_model_as_it_was(monkeypatch):
    from pyllmq.compression.jobs import in_memory

    model = make("Qwen3Moe")
    before, experts = logits(model), model.model.layers[0].mlp.experts

    def fail(*_):
        raise RuntimeError("the end")

    monkeypatch.setattr(in_memory, "_pack_all", lambda job, pack=in_memory._pack_all: (pack(job), fail()))
    with pytest.raises(RuntimeError, match="the end"):
        pyllmq.compress(model, pyllmq.KMeansConfig(4), progress=False)
    assert model.model.layers[0].mlp.experts is experts and torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="fits no Linear"):
        pyllmq.compress(model, pyllmq.KMeansConfig(4), include=["nothing"], progress=False)
    assert model.model.layers[0].mlp.experts is experts


def test_counting_and_visiting_that_fail_leave_the_stacks():
    model = make("Qwen3Moe")
    experts = model.model.layers[0].mlp.experts

    def fail(group, inputs):
        raise RuntimeError("no")

    with pytest.raises(ValueError, match="fits no Linear"):
        bits_for_size(model, 1 << 20, include=["nothing"])
    assert model.model.layers[0].mlp.experts is experts
    with pytest.raises(RuntimeError, match="no"):
        visit_groups(model, [torch.arange(3, 19)[None]], fail)
    assert model.model.layers[0].mlp.experts is experts


def test_some_experts_packed_others_dense(tmp_path):
    model = make("Qwen3Moe")
    exclude = (*pyllmq.swap.DEFAULT_EXCLUDE, "expert_2_up", "expert_2_down")
    pyllmq.compress(model, pyllmq.KMeansConfig(4), exclude=exclude, progress=False)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    pyllmq.save_pretrained(model, tmp_path / "packed")
    assert torch.equal(logits(pyllmq.from_pretrained(tmp_path / "packed", fuse=False)), logits(model))


def test_in_a_new_process_by_the_command(tmp_path):
    make("Mixtral").save_pretrained(tmp_path / "dense")
    code = """
import sys, torch, pyllmq
from pyllmq.cli import main
assert main(["compress", sys.argv[1], sys.argv[2], "--method", "kmeans", "--bits", "4", "--in-memory", "--quiet"]) == 0
main(["inspect", sys.argv[2]])
model = pyllmq.from_pretrained(sys.argv[2])
with torch.no_grad():
    torch.save(model(torch.arange(3, 24).view(3, 7)).logits, sys.argv[3])
"""
    said = in_a_new_process(code, tmp_path / "dense", tmp_path / "packed", tmp_path / "logits")
    assert "experts.expert_3_down" in said
    model = make("Mixtral")
    pyllmq.compress(model, pyllmq.KMeansConfig(4), progress=False)
    torch.testing.assert_close(torch.load(tmp_path / "logits"), logits(model), rtol=0, atol=1e-6)


def test_experts_that_nothing_takes_apart_stay_dense_and_are_named(tmp_path):
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = SIZES | {"intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 16}
    model = Llama4ForCausalLM(Llama4TextConfig(**sizes, interleave_moe_layer_step=1)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)  # Llama 4 leaves its experts without values
    stacks = {n: p.clone() for n, p in model.named_parameters() if p.dim() == 3}
    with pytest.warns(UserWarning, match="% of the Linear-like parameters stay dense without being asked.*experts"):
        report = pyllmq.compress(model, pyllmq.KMeansConfig(4), progress=False)
    assert stacks.keys() <= {item.name for item in report.left_dense}
    pyllmq.save_pretrained(model, tmp_path / "packed")
    again = pyllmq.from_pretrained(tmp_path / "packed", fuse=False)
    kept = dict(again.named_parameters())
    assert all(torch.equal(kept[name], stack) for name, stack in stacks.items())
    assert torch.equal(logits(again), logits(model))


def test_a_folder_that_lacks_an_expert(tmp_path):
    from safetensors.torch import load_file, save_file

    model = make("Qwen3Moe")
    pyllmq.compress(model, pyllmq.KMeansConfig(4), progress=False)
    pyllmq.save_pretrained(model, tmp_path / "packed")
    shutil.copytree(tmp_path / "packed", tmp_path / "lacking")
    gone = "model.layers.1.mlp.experts.expert_2_up"
    tensors = load_file(tmp_path / "packed/model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{gone}.")}
    save_file(kept, tmp_path / "lacking/model.safetensors", {"format": "pt"})
    with pytest.raises(pyllmq.FormatError, match=f"the tensor {gone}.* is missing"):
        pyllmq.from_pretrained(tmp_path / "lacking")
    config = json.loads((tmp_path / "lacking/config.json").read_text())
    del config["quantization_config"]["modules"][gone]
    (tmp_path / "lacking/config.json").write_text(json.dumps(config))
    with pytest.raises(pyllmq.FormatError, match="has no tensors for"):
        pyllmq.from_pretrained(tmp_path / "lacking")


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_dense_folder_that_lacks_an_expert(calibrated, tmp_path):
    """On disk Mixtral's experts are one by one; stacked they are one too few."""
    from safetensors.torch import load_file, save_file

    make("Mixtral").save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense/model.safetensors"
    kept = {key: tensor for key, tensor in load_file(file).items() if ".1.block_sparse_moe.experts.2." not in key}
    save_file(kept, file, {"format": "pt"})
    message = r"layers\.1\.mlp\.experts\.\w+, config.json asks for \[4, \d+, \d+\]: 3 of 4 experts are there"
    with pytest.raises(pyllmq.FormatError, match=message):
        if calibrated:
            config = pyllmq.ColumnCodebookConfig.preset("fast", 4.0)
            pyllmq.compress_folder(tmp_path / "dense", tmp_path / "packed", config, [torch.arange(24)[None]])
        else:
            pyllmq.compress_files(tmp_path / "dense", tmp_path / "packed", pyllmq.KMeansConfig(4))
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_with_a_forward_of_its_own_counts_where_it_multiplies(dtype):
    from transformers.models.falcon.modeling_falcon import FalconLinear

    from pyllmq.linears import linear_modules

    class Router(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).softmax(-1)

    class Pair(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    torch.set_default_dtype(dtype)
    try:
        model = torch.nn.ModuleList([FalconLinear(4, 4), Router(4, 4), torch.nn.Linear(4, 4), Pair(4, 4)])
        assert [name for name, _ in linear_modules(model)] == ["0", "2"]
    finally:
        torch.set_default_dtype(torch.float32)
