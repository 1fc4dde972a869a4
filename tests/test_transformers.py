"""Packed folders through transformers: same logits, same tensors on a second save, and every kind of damage refused."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import pyllmq
from pyllmq import CLAQConfig, CodebookLinear, FormatError

from . import models
from .new_process import run_python


def compressed(make=models.tiny_llama, **kwargs):
    model = make()
    exclude = (*pyllmq.swap.DEFAULT_EXCLUDE, *(["pooler"] if make is models.tiny_bert else []))
    pyllmq.compress(
        model, CLAQConfig(bits=3.12, outliers=0.005), models.token_batches(2), exclude=exclude, progress=False
    )
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("packed") / "llama"
    pyllmq.save_pretrained(compressed(), path)
    return path


def copy_of(folder, tmp_path):
    target = tmp_path / "copy"
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_round_trip(tmp_path):
    model = compressed()
    ids = torch.randint(0, 512, (2, 16))
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "first")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert isinstance(loaded.model.layers[1].mlp.down_proj, CodebookLinear)
    assert type(loaded.lm_head) is torch.nn.Linear
    assert torch.equal(loaded(ids).logits, expected)
    ours = pyllmq.from_pretrained(tmp_path / "first")
    assert type(ours) is type(model) and torch.equal(ours(ids).logits, expected)

    loaded.save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) and first[k].dtype == second[k].dtype for k in first)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second")]
    assert configs[0] == configs[1] and configs[0]["quantization_config"]["quant_method"] == "pyllmq"


def test_folder_is_really_smaller(folder, tmp_path):
    dense = models.tiny_llama()
    dense.save_pretrained(tmp_path)
    linears = sum(
        m.weight.numel() * 4 for n, m in dense.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    )
    saved = (tmp_path / "model.safetensors").stat().st_size - (folder / "model.safetensors").stat().st_size
    assert saved > 0.6 * linears


@pytest.mark.parametrize(("make", "auto"), [(models.tiny_bert, AutoModel), (models.tiny_gpt2, AutoModelForCausalLM)])
def test_other_architectures(tmp_path, make, auto):
    model = compressed(make)
    ids = torch.randint(0, 512, (2, 16))
    expected = model(ids)[0]
    pyllmq.save_pretrained(model, tmp_path / "m")
    for loaded in (auto.from_pretrained(tmp_path / "m"), pyllmq.from_pretrained(tmp_path / "m")):
        assert torch.equal(loaded(ids)[0], expected)


def test_base_model_out_of_a_folder_with_a_head(folder):
    base = AutoModel.from_pretrained(folder)
    assert isinstance(base.layers[0].self_attn.q_proj, CodebookLinear)
    whole = pyllmq.from_pretrained(folder)
    ids = torch.randint(0, 512, (1, 8))
    assert torch.equal(base(ids)[0], whole.model(ids)[0])


def test_sharded_folder(tmp_path):
    model = compressed()
    model.save_pretrained(tmp_path / "m", max_shard_size="100KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    ids = torch.randint(0, 512, (1, 8))
    assert torch.equal(pyllmq.from_pretrained(tmp_path / "m")(ids).logits, model(ids).logits)


def test_bf16_does_not_touch_codebooks(folder):
    plain = pyllmq.from_pretrained(folder)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    for a, b in zip(plain.modules(), half.modules(), strict=True):
        if isinstance(a, CodebookLinear):
            for key, tensor in a.state_dict().items():
                assert b.state_dict()[key].dtype == tensor.dtype and torch.equal(b.state_dict()[key], tensor)
    ids = torch.randint(0, 512, (1, 8))
    assert torch.allclose(half(ids).logits.float(), plain(ids).logits, atol=0.05)


def test_renamed_tensors_get_the_dtype_that_was_asked_for(folder, tmp_path):
    """A base model out of a folder with a head, and experts that the file holds one by one."""
    assert {p.dtype for p in AutoModel.from_pretrained(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    mixtral = models.tiny_mixtral(num_experts_per_tok=4)
    pyllmq.swap_linear(mixtral, lambda linear: CodebookLinear.from_dense(linear, bits=4))
    pyllmq.save_pretrained(mixtral, tmp_path)
    half = pyllmq.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    ids = torch.randint(0, 512, (1, 8))
    assert torch.allclose(half(ids).logits.float(), mixtral(ids).logits, atol=0.05)


def test_what_the_architecture_keeps_in_fp32_stays(tmp_path):
    model = models.tiny_t5()
    pyllmq.swap_linear(model, lambda linear: CodebookLinear.from_dense(linear, bits=4), exclude=("lm_head", "wo"))
    pyllmq.save_pretrained(model, tmp_path)
    half = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16)
    found = {name.rpartition(".")[0].rpartition(".")[2]: p.dtype for name, p in half.named_parameters()}
    assert found["wo"] == torch.float32 and found["shared"] == torch.float16


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(folder, device_map):
    ids = torch.randint(0, 512, (1, 8))
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    assert torch.equal(model(ids).logits, pyllmq.from_pretrained(folder)(ids).logits)
    assert model.model.layers[0].mlp.up_proj.weight.device.type == model.device.type


def test_offloading_to_disk_is_refused(folder, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
    with pytest.raises(ValueError, match=r"puts model\.layers\.1\..* and 6 more packed layers on disk"):
        AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)


def test_generate(folder):
    model = pyllmq.from_pretrained(folder)
    ids = torch.randint(0, 512, (1, 8))
    out = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert out.shape == (1, 14)
    greedy = ids
    for _ in range(6):
        logits = model(greedy).logits[:, -1]
        logits[:, model.generation_config.eos_token_id] = -torch.inf
        greedy = torch.cat([greedy, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, greedy)


def test_swapped_layers_are_saved_too(tmp_path):
    model = models.tiny_llama()
    names = pyllmq.swap_linear(model, lambda linear: CodebookLinear.from_dense(linear, bits=4))
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 512, (1, 8))
    assert len(names) == 14 and torch.equal(pyllmq.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_a_new_process_loads_it_in_either_import_order(folder):
    ids = [[1, 2, 3, 4]]
    expected = pyllmq.from_pretrained(folder)(torch.tensor(ids)).logits.double().sum().item()
    for imports in (
        "import pyllmq, transformers",
        "import transformers.quantizers.auto, pyllmq",
        "import transformers, pyllmq",
    ):
        code = (
            f"{imports}, torch; m = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}); "
            f"print('SUM', repr(m(torch.tensor({ids})).logits.double().sum().item()))"
        )
        if imports.startswith("import pyllmq"):  # run_python has imported transformers, but not its quantizers
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        else:
            done = run_python("-c", code)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout.split("SUM")[1]) == expected


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit(folder, key, change):
    rewrite(folder, lambda tensors: tensors.update({f"{Q}.{key}": change(tensors[f"{Q}.{key}"])}))


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


Q = "model.layers.0.self_attn.q_proj"


def first_module(described):
    return described["modules"][Q]


DAMAGE = {
    "unknown version": (lambda f: edit_config(f, lambda q: q.update(format_version=2)), "reads version 1"),
    "unknown key": (lambda f: edit_config(f, lambda q: q.update(run="import os")), "unknown keys"),
    "no modules": (lambda f: edit_config(f, lambda q: q.update(modules={})), "packed modules"),
    "unknown kind": (lambda f: edit_config(f, lambda q: first_module(q).update(kind="x")), "reads: .*'codebook'"),
    "widths": (lambda f: edit_config(f, lambda q: first_module(q).update(columns={"3": 63})), "sum to in_features"),
    "shape": (lambda f: edit_config(f, lambda q: first_module(q).update(out_features=65)), r"\[65, 64\]|asks for"),
    "other module": (lambda f: edit_config(f, lambda q: q["modules"].update({"no.such": first_module(q)})), "no.such"),
    "outlier count": (lambda f: edit_config(f, lambda q: first_module(q).update(outliers=1)), "outlier"),
    "missing codes": (lambda f: rewrite(f, lambda t: t.pop(f"{Q}.codes_b3")), "codes_b3 is missing"),
    "short codebook": (lambda f: edit(f, "codebook", lambda t: t[:, :-1].contiguous()), "codebook"),
    "bf16 codebook": (lambda f: edit(f, "codebook", torch.Tensor.bfloat16), "float16"),
    "nan codebook": (lambda f: edit(f, "codebook", lambda t: t * torch.nan), f"{Q}.*not finite"),
    "outlier place": (lambda f: edit(f, "outlier_columns", lambda t: torch.full_like(t, 999)), "allowed: 0 to 63"),
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 5000), "truncated or damaged"),
    "not safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04pickle"), "truncated or damaged"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_refused(folder, tmp_path, damage):
    act, message = DAMAGE[damage]
    target = copy_of(folder, tmp_path)
    act(target)
    with pytest.raises(FormatError, match=message):
        pyllmq.from_pretrained(target)


def test_dense_folders_and_wrong_classes(folder, tmp_path):
    models.tiny_llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(FormatError, match="not a pyllmq folder"):
        pyllmq.from_pretrained(tmp_path / "dense")
    from transformers import BertModel

    with pytest.raises(FormatError, match="has no Linear of that name"):
        BertModel.from_pretrained(folder)


def test_a_failed_save_leaves_the_earlier_folder(folder, tmp_path, monkeypatch):
    target = copy_of(folder, tmp_path)
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    model = compressed()

    def fail(path):
        raise OSError("no space left on device")

    class Tokenizer:
        save_pretrained = staticmethod(fail)

    with pytest.raises(OSError, match="no space"):
        pyllmq.save_pretrained(model, target, Tokenizer())
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["copy"], "nothing else is left behind"
    pyllmq.save_pretrained(model, target)
    assert torch.equal(pyllmq.from_pretrained(target).lm_head.weight, model.lm_head.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        pyllmq.save_pretrained(model, tmp_path / "file")


def test_only_plain_tensors_are_stored(folder):
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors"}
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        assert set(tensors.metadata()) == {"format"}


def changed_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def changed_config(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def test_dense_tensors_of_a_packed_folder_are_checked_too(folder, tmp_path):
    """transformers compares no shape where a folder is quantized, and fills what is missing with random numbers."""
    damaged = copy_of(folder, tmp_path)
    embedding = "model.embed_tokens.weight"
    changed_tensors(damaged, lambda t: t.update({embedding: t[embedding][:-1].clone()}))
    for load in (pyllmq.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(FormatError, match=rf"{embedding} is \(511, 64\), but config.json asks for \(512, 64\)"):
            load(damaged)
    changed_tensors(damaged, lambda t: t.pop(embedding))
    with pytest.raises(FormatError, match=f"no tensors for 1 parameters of LlamaForCausalLM, such as {embedding}"):
        pyllmq.from_pretrained(damaged)


def test_tensors_at_odd_offsets(folder, tmp_path):
    """The format allows them; kernels want them where their dtype does."""
    shifted = copy_of(folder, tmp_path)
    file = shifted / "model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].rstrip() + b" " * 3
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    ids = torch.randint(0, 512, (1, 5))
    model = pyllmq.from_pretrained(shifted)
    assert torch.equal(model(ids).logits, pyllmq.from_pretrained(folder)(ids).logits)
    layer = model.model.layers[0].self_attn.q_proj
    assert all(t.data_ptr() % t.itemsize == 0 for t in layer.packed_weight().tensors.values())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_hidden_layers": 10**9}, "asks for 1000000000 layers"),
        (
            {"quantization_config": {"quant_method": "pyllmq", "modules": {"lm_head": 3}}},
            "module lm_head is 3; it must be",
        ),
        ({"quantization_config": {"quant_method": "pyllmq", "modules": [1]}}, "must name its packed modules"),
    ],
)
def test_what_config_json_cannot_say(folder, tmp_path, entries, message):
    damaged = copy_of(folder, tmp_path)
    changed_config(damaged, **entries)
    with pytest.raises(FormatError, match=message):
        pyllmq.from_pretrained(damaged)


@pytest.mark.parametrize("architectures", [["logging"], ["pipeline"], ["GPT2Config"], [], None])
def test_an_architecture_that_is_no_model(folder, tmp_path, architectures):
    other = copy_of(folder, tmp_path)
    changed_config(other, architectures=architectures)
    assert type(pyllmq.from_pretrained(other)).__name__ == "LlamaModel"
