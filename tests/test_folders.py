"""Folders as users have them: names of their own, no class name, code of their own, other files, pickled weights, tied heads."""

import json
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

import pyllmq
from pyllmq import CLAQConfig, CodebookLinear, FormatError, KMeansConfig, folders, loading
from pyllmq.cli import main
from pyllmq.folders import PackedFolder, checkpoint_files
from pyllmq.integrations.checkpoint import StreamedModel

from . import models
from .new_process import run_python

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}


def tiny_llava():
    """Linears have other names in the file than in the module tree."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(image_size=32, patch_size=8, **SIZES)
    text = LlamaConfig(vocab_size=512, **SIZES)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=511, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).eval()


def tiny_bert_mlm():
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(vocab_size=512, **SIZES)).eval()


def tiny_whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
             "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_source_positions": 50,
             "max_target_positions": 64, "num_mel_bins": 20}  # fmt: skip
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperForConditionalGeneration(WhisperConfig(vocab_size=512, **sizes, **ids)).eval()


def rewrite_config(folder, **entries):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def in_memory(source, output, batches):
    model = loading.load_model(source)
    pyllmq.compress(model, CLAQConfig(bits=4), batches, progress=False)
    pyllmq.save_pretrained(model, output, source=source)
    return model


def by_blocks(source, output, batches):
    pyllmq.compress_folder(source, output, CLAQConfig(bits=4), batches, progress=False)


def by_files(source, output, batches):
    pyllmq.compress_files(source, output, KMeansConfig(4), progress=False)


WAYS = [in_memory, by_blocks, by_files]


# ---- names in the file and in the model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llava") / "dense"
    tiny_llava().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_linears_with_other_names_in_the_file(llava, tmp_path, way):
    batches = models.token_batches(1, 12)
    model = way(llava, tmp_path / "packed", batches)
    packed = PackedFolder.open(tmp_path / "packed")
    assert all(name.startswith(("language_model.model.layers", "vision_tower")) for name in packed.structures)
    loaded = pyllmq.from_pretrained(tmp_path / "packed")
    assert isinstance(loaded.model.language_model.layers[0].mlp.up_proj, CodebookLinear)
    assert len(packed.structures) == sum(isinstance(module, CodebookLinear) for module in loaded.modules())
    if model is not None:
        assert torch.equal(loaded(batches[0]).logits, model(batches[0]).logits)
    else:
        dense = loading.load_model(llava)(batches[0]).logits
        assert float((loaded(batches[0]).logits - dense).norm() / dense.norm()) < 0.5
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).exists()
    a, b = (PackedFolder.open(tmp_path / name) for name in ("packed", "again"))
    assert a.description == b.description and a.headers.keys() == b.headers.keys()


@pytest.mark.parametrize("way", [by_blocks, by_files])
def test_a_folder_with_the_prefix_of_another_class(tmp_path, way):
    """A bare encoder out of a checkpoint with a head: `bert.encoder...` in the file, `encoder...` in the model."""
    source = tmp_path / "source"
    tiny_bert_mlm().save_pretrained(source)
    rewrite_config(source, architectures=["BertModel"])
    held = load_file(source / "model.safetensors")
    held |= {"bert.pooler.dense.weight": torch.randn(64, 64), "bert.pooler.dense.bias": torch.zeros(64)}
    from safetensors.torch import save_file

    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"tensors of .* have no place in BertModel and are copied as they are: cls\."):
        way(source, tmp_path / "packed", models.token_batches(1, 12))
    packed = (
        load_file(tmp_path / "packed" / "model.safetensors")
        if way is by_files
        else PackedFolder.open(tmp_path / "packed").headers
    )
    assert "cls.predictions.transform.dense.weight" in packed, "what has no place in the class is not lost"
    assert type(pyllmq.from_pretrained(tmp_path / "packed")).__name__ == "BertModel"


def test_a_folder_that_could_not_be_loaded_is_never_put_in_place(tmp_path, monkeypatch):
    """Whatever is written, it is opened before the job ends."""
    source, output = tmp_path / "source", tmp_path / "output"
    models.tiny_llama(num_hidden_layers=1).save_pretrained(source)
    settings = StreamedModel.save_settings

    def other_sizes(self, folder):
        settings(self, folder)
        rewrite_config(folder, num_hidden_layers=2)

    with monkeypatch.context() as patch, pytest.raises(FormatError, match=r"no tensors for 9 parameters of Llama"):
        patch.setattr(StreamedModel, "save_settings", other_sizes)
        by_files(source, output, None)
    assert not output.exists()
    model = models.tiny_llama(num_hidden_layers=1)
    pyllmq.swap_linear(model, lambda linear: CodebookLinear.from_dense(linear, bits=2))
    model.config.num_hidden_layers = 2
    with pytest.raises(FormatError, match="no tensors for 9 parameters"):
        pyllmq.save_pretrained(model, output)
    assert not output.exists()


def test_a_folder_is_read_once(tmp_path, monkeypatch):
    model = models.tiny_llama(num_hidden_layers=1)
    pyllmq.swap_linear(model, lambda linear: CodebookLinear.from_dense(linear, bits=2))
    pyllmq.save_pretrained(model, tmp_path / "m")
    calls = []
    for owner, name in ((folders, "read_headers"), (folders, "structure_from_dict")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    pyllmq.from_pretrained(tmp_path / "m")
    assert calls.count("read_headers") == 1 and calls.count("structure_from_dict") == 7


# ---- the class of a model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architectures", [None, ..., ["MyLlamaForCausalLM"], ["LlamaConfig"]])
def test_an_unknown_architecture_is_an_error_with_a_way_out(tmp_path, architectures, capsys):
    source, output = tmp_path / "source", tmp_path / "output"
    models.tiny_llama(num_hidden_layers=1).save_pretrained(source)
    rewrite_config(source, architectures=architectures)
    wanted = "which is no model class of transformers .*--architecture.*LlamaForCausalLM"
    for way in WAYS:
        with pytest.raises(ValueError, match=wanted):
            way(source, output, models.token_batches(1, 12))
    assert not output.exists()
    with pytest.raises(ValueError, match="architecture is 'Nothing', which is no model class"):
        StreamedModel(source, architecture="Nothing")
    models.tiny_tokenizer().save_pretrained(source)
    command = ["compress", str(source), str(output), "--method", "kmeans", "--bits", "8", "--quiet"]
    assert main(command) == 1 and "--architecture" in capsys.readouterr().err
    assert main([*command, "--architecture", "LlamaForCausalLM"]) == 0
    assert type(pyllmq.from_pretrained(output)).__name__ == "LlamaForCausalLM"


def test_a_packed_folder_without_a_class_says_so(tmp_path):
    model = models.tiny_llama(num_hidden_layers=1)
    pyllmq.swap_linear(model, lambda linear: CodebookLinear.from_dense(linear, bits=2))
    pyllmq.save_pretrained(model, tmp_path / "m")
    rewrite_config(tmp_path / "m", architectures=["Other"])
    with pytest.warns(UserWarning, match="without a head. Name the class as auto_class"):
        pyllmq.from_pretrained(tmp_path / "m")


# ---- code in a folder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mine", "llama"])
def test_code_in_a_folder_never_runs(tmp_path, model_type, monkeypatch):
    """Whatever opens the folder, whoever answers: no prompt, no wait, no code."""
    folder = tmp_path / "own"
    models.tiny_llama(num_hidden_layers=1).save_pretrained(folder)
    models.tiny_tokenizer().save_pretrained(folder)
    own = {
        "AutoConfig": "mine.MineConfig",
        "AutoModel": "mine.MineModel",
        "AutoTokenizer": ["mine.MineTokenizer", None],
    }
    rewrite_config(folder, model_type=model_type, architectures=["MineModel"], auto_map=own)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(told | {"auto_map": own, "tokenizer_class": "MineTokenizer"})
    )
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w').close()\nraise SystemExit\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    for act in (
        lambda: StreamedModel(folder),
        lambda: loading.load_model(folder),
        lambda: loading.load_tokenizer(folder),
        lambda: pyllmq.compress_files(folder, tmp_path / "out", KMeansConfig(2), progress=False),
    ):
        with pytest.raises(ValueError, match=r"never executed|no tokenizer that transformers can load"):
            act()
    for method in (["--method", "kmeans"], ["--preset", "fast"], ["--in-memory", "--preset", "fast"]):
        assert main(["compress", str(folder), str(tmp_path / "out"), *method, "--quiet"]) == 1
    assert main(["eval", str(folder)]) == 1 and not (tmp_path / "RAN").exists()
    if model_type == "llama":  # a class of transformers' own, named by the user, does without that code
        assert type(StreamedModel(folder, architecture="LlamaForCausalLM").model).__name__ == "LlamaForCausalLM"
        assert not (tmp_path / "RAN").exists()
    packed = tmp_path / "packed"
    model = models.tiny_llama(num_hidden_layers=1)
    pyllmq.swap_linear(model, lambda linear: CodebookLinear.from_dense(linear, bits=2))
    pyllmq.save_pretrained(model, packed, source=folder)
    rewrite_config(packed, model_type=model_type, auto_map=own)
    try:
        pyllmq.from_pretrained(packed)
    except ValueError as error:
        assert model_type == "mine" and "never executed" in str(error)
    assert not (tmp_path / "RAN").exists()


# ---- what else is in a folder ---------------------------------------------------------------------------------------

OTHERS = ("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "LICENSE",
          "README.md", "chat_template.jinja", "preprocessor_config.json", "tokenizer.model", "sub/deep/file.txt",
          "sparse_linear.pt", "other.safetensors")  # fmt: skip
REPLACED = ("pytorch_model.bin", "model.onnx", "onnx/model.onnx", "tf_model.h5", ".git/config", "checkpoint-5/x.bin",
            "consolidated.00.pth", "optimizer.pt")  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_everything_else_is_copied(tmp_path, way, capsys):
    source, output = tmp_path / "source", tmp_path / "source" / "packed"  # inside SRC: it must not copy itself
    model = models.tiny_llama(num_hidden_layers=1)
    model.generation_config.temperature = 0.25
    model.generation_config.do_sample = True
    model.save_pretrained(source)
    models.tiny_tokenizer().save_pretrained(source)
    for name in (*OTHERS, *REPLACED):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(f"content of {name}")
    (source / "linked.txt").symlink_to(source / "LICENSE")
    (source / "loop").symlink_to(source)
    for _ in range(2):  # an earlier OUT is replaced, not copied
        way(source, output, models.token_batches(1, 12))
    names = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    for name in (*OTHERS, "linked.txt", "tokenizer.json", "tokenizer_config.json"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    assert not names & set(REPLACED) and not any(name.startswith(("packed", "loop")) for name in names)
    assert json.loads((output / "generation_config.json").read_text())["temperature"] == 0.25
    capsys.readouterr()
    assert main(["inspect", str(output)]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in OTHERS)


def test_the_weights_are_those_that_transformers_takes(tmp_path):
    """An index of an earlier save is left beside a single file."""
    torch.manual_seed(2)
    source = tmp_path / "source"
    models.tiny_llama(num_hidden_layers=1).save_pretrained(source, max_shard_size="100KB")
    assert (source / "model.safetensors.index.json").exists()
    model = models.tiny_llama(num_hidden_layers=1)
    model.save_pretrained(tmp_path / "newer")
    shutil.copy(tmp_path / "newer" / "model.safetensors", source)
    by_files(source, tmp_path / "packed", None)
    packed = pyllmq.from_pretrained(tmp_path / "packed")
    assert torch.equal(packed.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert sorted(file.name for file in (tmp_path / "packed").glob("model*")) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"num_attention_heads": 3},
            "config.json of .* describes no model .*not a multiple of the number of attention heads",
        ),
        ({"hidden_size": "64"}, "config.json of .* describes no model .*expected int, got str"),
        ({"transformers_weights": "other.safetensors"}, "names 'other.safetensors' as its weights"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"is quantized already \(gptq\)"),
        ({"quantization_config": None}, None),
    ],
)
def test_what_config_json_says_of_a_dense_folder(tmp_path, entries, message, capsys):
    source = tmp_path / "source"
    models.tiny_llama(num_hidden_layers=1).save_pretrained(source)
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    command = ["compress", str(source), str(tmp_path / "packed"), "--method", "kmeans", "--quiet"]
    for more in ([], ["--in-memory"]):
        assert main([*command, *more]) == (0 if message is None else 1)
        assert message is None or re.search(message, capsys.readouterr().err)
    assert (tmp_path / "packed").exists() == (message is None)


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    models.tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "adapter_config.json").write_text("{}")
    for way in WAYS:
        with pytest.raises(ValueError, match=r"adapter_config.json\) beside the model's weights; merge it"):
            way(tmp_path / "source", tmp_path / "packed", models.token_batches(1, 12))
    assert not (tmp_path / "packed").exists()


# ---- pickled weights ------------------------------------------------------------------------------------------------


def pickled(folder, model, shards=1):
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    held = dict(model.state_dict())
    if shards == 1:
        torch.save(held, folder / "pytorch_model.bin")
        return
    parts = [dict(list(held.items())[i::shards]) for i in range(shards)]
    names = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, folder / name)
    where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shards", [1, 2])
def test_pickled_weights_are_the_same_weights(tmp_path, way, shards):
    torch.manual_seed(1)
    model = models.tiny_llama(num_hidden_layers=1, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "plain")
    pickled(tmp_path / "pickled", model, shards)
    batches = models.token_batches(1, 12)
    for name in ("plain", "pickled"):
        way(tmp_path / name, tmp_path / f"{name}-packed", batches)
    found = []
    for name in ("plain-packed", "pickled-packed"):
        files = sorted((tmp_path / name).iterdir())
        assert not [file for file in files if file.suffix == ".bin" or "pytorch_model" in file.name]
        found.append({k: t for file in files if file.suffix == ".safetensors" for k, t in load_file(file).items()})
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][key], found[1][key]) for key in found[0])


class Runs:
    def __reduce__(self):
        return exec, ("raise SystemExit('code in a pickle ran')",)


def test_pickles_that_are_more_than_tensors_are_refused(tmp_path):
    source = tmp_path / "source"
    pickled(source, models.tiny_llama(num_hidden_layers=1))
    for content in (
        lambda f: torch.save({"a": Runs()}, f),
        lambda f: f.write_bytes(pickle.dumps(Runs())),
        lambda f: f.write_bytes(b"PK"),
    ):
        content(source / "pytorch_model.bin")
        with pytest.raises(FormatError, match="cannot be read as tensors only .* write it again with save_pretrained"):
            by_files(source, tmp_path / "output", None)
    (source / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no weights: none of model.safetensors, .*pytorch_model.bin"):
        by_files(source, tmp_path / "output", None)


# ---- pickling a model -----------------------------------------------------------------------------------------------


def test_a_packed_model_can_be_pickled_whole(tmp_path):
    model = models.tiny_llama(num_hidden_layers=1)
    pyllmq.swap_linear(model, lambda linear: CodebookLinear.from_dense(linear, bits=3))
    pyllmq.save_pretrained(model, tmp_path / "m")
    ids = torch.arange(8)[None]
    for packed in (model, pyllmq.from_pretrained(tmp_path / "m")):
        assert torch.equal(pickle.loads(pickle.dumps(packed))(ids).logits, model(ids).logits)
    torch.save(model, tmp_path / "whole.pt")
    code = (  # a process that has imported nothing of ours, as spawn and Ray have them
        f"import torch; m = torch.load({str(tmp_path / 'whole.pt')!r}, weights_only=False); "
        f"m.save_pretrained({str(tmp_path / 'again')!r}); print(repr(m(torch.arange(8)[None]).logits.double().sum().item()))"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == model(ids).logits.double().sum().item()
    assert PackedFolder.open(tmp_path / "again").description == PackedFolder.open(tmp_path / "m").description


# ---- output layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "head"), [(tiny_bert_mlm, "cls.predictions.decoder"), (tiny_whisper, "proj_out")])
def test_an_output_layer_of_another_name_stays_dense_with_a_word(tmp_path, make, head):
    model = make()
    model.save_pretrained(tmp_path / "dense")
    report = pyllmq.compress_files(tmp_path / "dense", tmp_path / "packed", KMeansConfig(4), progress=False)
    why = {item.name: item for item in report.left_dense}
    assert why[head].asked and "shares its weight with" in why[head].why
    assert head not in {layer.name for layer in report.layers}
    loaded = pyllmq.from_pretrained(tmp_path / "packed")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    untied = make()
    untied.get_output_embeddings().weight = torch.nn.Parameter(torch.randn(512, 64))
    assert head not in pyllmq.linears.select_linears(untied) and head in pyllmq.linears.select_linears(
        untied, exclude=()
    )


def test_linears_that_share_a_weight_stay_dense():
    net = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in "abc"})
    net["b"].weight = net["a"].weight
    assert pyllmq.linears.tied_weights(net, "abc") == {"a": "b", "b": "a"}
    assert list(pyllmq.linears.select_linears(net)) == ["c"]


@pytest.mark.parametrize("make", [lambda: models.tiny_llama(tie_word_embeddings=True), models.tiny_t5, tiny_bert_mlm])
def test_a_tied_head_that_was_packed_saves_and_loads(tmp_path, make):
    model = make()
    pyllmq.swap_linear(model, lambda linear: CodebookLinear.from_dense(linear, bits=8), exclude=())
    assert isinstance(model.get_output_embeddings(), CodebookLinear)
    pyllmq.save_pretrained(model, tmp_path / "m")
    loaded = pyllmq.from_pretrained(tmp_path / "m")
    assert isinstance(loaded.get_output_embeddings(), CodebookLinear)
    inputs = {"input_ids": torch.randint(0, 512, (2, 8))}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    loaded.save_pretrained(tmp_path / "again")
    shutil.rmtree(tmp_path / "m")
    assert torch.equal(pyllmq.from_pretrained(tmp_path / "again")(**inputs).logits, model(**inputs).logits)


def test_arguments_that_change_the_config_are_passed_on(tmp_path):
    model = models.tiny_llama(num_hidden_layers=1)
    pyllmq.swap_linear(model, lambda linear: CodebookLinear.from_dense(linear, bits=2))
    pyllmq.save_pretrained(model, tmp_path / "m")
    loaded = pyllmq.from_pretrained(tmp_path / "m", output_hidden_states=True)
    assert loaded(torch.arange(5)[None]).hidden_states is not None


def test_a_model_with_nothing_packed_is_not_marked(tmp_path):
    model = models.tiny_llama(num_hidden_layers=1)
    assert pyllmq.swap_linear(model, CodebookLinear.from_dense, exclude=("re:.*",)) == []
    model.save_pretrained(tmp_path / "dense")
    assert not folders.is_packed(tmp_path / "dense")
    with pytest.raises(FormatError, match="is not a pyllmq folder"):
        pyllmq.save_pretrained(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("where", [[], {"a": 1, "b": "x"}, {"a": {}}, {"a": None}, {"a": 3}, 7], ids=str)
def test_an_index_that_names_no_files_is_damaged(tmp_path, where):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(FormatError, match="cannot be read"):
        checkpoint_files(tmp_path)
