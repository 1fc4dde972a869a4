"""Options that no other test names: each does what it says, and none is ignored."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from transformers import AutoModel

import pyllmq
from pyllmq import CLAQConfig, CodebookLinear, ColumnCodebookConfig, KMeansConfig, SparseConfig
from pyllmq.folders import PackedFolder
from pyllmq.nn import PackedLinear

from .models import tiny_bert, tiny_llama, tiny_tokenizer

IDS = [torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(i)) for i in range(3)]
OTHER = [torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(9))]
FAST = ColumnCodebookConfig.preset("fast", 3.0, outliers=True)


@cache
def dense(make=tiny_llama):
    torch.manual_seed(0)
    return make(num_hidden_layers=1) if make is tiny_llama else make()


def compressed(config, make=tiny_llama, **options):
    model = copy.deepcopy(dense(make))
    report = pyllmq.compress(model, config, IDS, progress=False, **options)
    return model, report


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    dense().save_pretrained(folder)
    return folder


def packed_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def same(a, b):
    mine, yours = a.state_dict(), b.state_dict()
    return mine.keys() == yours.keys() and all(torch.equal(mine[name], yours[name]) for name in mine)


# ---- settings of the methods ------------------------------------------------------------------------------------------


@cache
def compressed_as(config, make):
    return compressed(config, make)[0]


SPARSE = SparseConfig(sparsity=0.5, method="sparsegpt")
FITTED = ColumnCodebookConfig(bits=3.0, guidance="none")


@pytest.mark.parametrize(
    ("config", "changes", "make"),
    [
        (CLAQConfig(2.1), {"kmeans": "lloyd"}, tiny_llama),
        (CLAQConfig(2.1), {"act_order": False}, tiny_llama),
        (CLAQConfig(2.1), {"damping": 0.2}, tiny_llama),
        (CLAQConfig(2.1), {"true_sequential": False}, tiny_llama),
        (CLAQConfig(2.1), {"outlier_order_threshold": 3.0}, tiny_llama),
        (CLAQConfig(2.1), {"share_bits": False, "outlier_order_threshold": 3.0}, tiny_llama),
        (FAST, {"act_order": False}, tiny_llama),
        (FAST, {"damping": 0.2}, tiny_llama),
        (FAST, {"true_sequential": False}, tiny_llama),
        (FAST, {"share_bits": False}, tiny_llama),
        (FAST, {"propagation": 0.0}, tiny_llama),
        (FAST, {"correct_bias": False}, tiny_bert),
        (FITTED, {"tolerance": 1.0}, tiny_llama),
        (SPARSE, {"damping": 0.5}, tiny_llama),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_setting_changes_the_result(config, changes, make):
    changed = type(config).from_dict(config.to_dict() | changes)
    assert not same(compressed_as(config, make), compressed_as(changed, make))


def test_the_size_of_blocks_changes_rounding_alone():
    outputs = [compressed_as(CLAQConfig(4.0, block_size=size), tiny_llama)(IDS[0]).logits for size in (128, 7)]
    assert (outputs[0] - outputs[1]).norm() < 0.05 * (outputs[0] - dense()(IDS[0]).logits).norm()


def heavy_tailed_llama():
    """Weights of a Cauchy distribution: a few are worth keeping in fp16."""
    model = tiny_llama(num_hidden_layers=1, hidden_size=128, intermediate_size=256)
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.cauchy_(sigma=0.02).clamp_(-1000, 1000)
    return model


def test_what_a_column_codebook_may_hold():
    def layers(config):
        model = compressed(config, heavy_tailed_llama)[0]
        return [module for module in model.modules() if isinstance(module, CodebookLinear)]

    rich = layers(ColumnCodebookConfig.preset("fast", 2.25, outliers=True))
    assert any(layer.structure.outliers for layer in rich) and all(layer.structure.row_scale for layer in rich)
    changes = {"widths": (2, 4), "outliers": False, "row_scale": False}
    poor = layers(ColumnCodebookConfig.from_dict(FAST.to_dict() | changes))
    assert len(poor) == len(rich) == 7
    for layer in poor:
        assert layer.structure.outliers == 0 and not layer.structure.row_scale
        assert set(layer.packed_weight().column_bits.tolist()) <= {2, 4}


def test_kmeans_with_a_row_scale(source, tmp_path):
    for row_scale in (False, True):
        pyllmq.compress_files(source, tmp_path / "out", KMeansConfig(3, row_scale=row_scale), progress=False)
        assert {s.row_scale for s in PackedFolder.open(tmp_path / "out").structures.values()} == {row_scale}


# ---- arguments of functions -------------------------------------------------------------------------------------------


def test_text_and_seed_of_the_tuning():
    config = ColumnCodebookConfig.from_dict(FAST.to_dict() | {"tune_steps": 4})
    _, own = compressed(config, tuning=OTHER)
    _, default = compressed(config)
    model = compressed(FAST)[0]
    apart = [
        pyllmq.tune_codebooks(copy.deepcopy(model), dense(), text, steps=4, seed=seed, progress=False)
        for text, seed in ((OTHER, 0), (IDS, 0), (IDS, 3))
    ]
    assert own.tuning_losses == pytest.approx(apart[0], rel=1e-4)
    assert default.tuning_losses == pytest.approx(apart[1], rel=1e-4)
    assert apart[1] != pytest.approx(apart[2], rel=1e-4) and apart[0] != pytest.approx(apart[1], rel=1e-4)
    by_block = [
        next(iter(pyllmq.tune_blocks(copy.deepcopy(model), dense(), IDS, steps=4, seed=seed, progress=False).values()))
        for seed in (0, 0, 3)
    ]
    assert by_block[0] == by_block[1] != by_block[2]


def test_patterns_choose_the_linears(source, tmp_path):
    wanted = {"model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"}
    patterns = {"include": ["*mlp*"], "exclude": ["*down_proj", "lm_head"]}
    model, _ = compressed(FAST, **patterns)
    assert packed_names(model) == wanted

    pruned = copy.deepcopy(dense())
    for module in pruned.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data[:, ::2] = 0
    pyllmq.pack_pruned(pruned, **patterns)
    assert packed_names(pruned) == wanted

    tokenizer = tiny_tokenizer()
    pyllmq.compress_folder(source, tmp_path / "a", FAST, IDS, others=[tokenizer], progress=False, **patterns)
    pyllmq.compress_files(source, tmp_path / "b", KMeansConfig(2), others=[tokenizer], progress=False, **patterns)
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert set(PackedFolder.open(folder).structures) == wanted and (folder / "tokenizer.json").exists()


def test_a_folder_opened_by_another_class(tmp_path):
    model = compressed(FAST)[0]
    pyllmq.save_pretrained(model, tmp_path / "packed")
    trunk = pyllmq.from_pretrained(tmp_path / "packed", auto_class=AutoModel)
    assert type(trunk).__name__ == "LlamaModel" and packed_names(trunk) == {
        name.removeprefix("model.") for name in packed_names(model)
    }
    torch.testing.assert_close(trunk(IDS[0]).last_hidden_state, model.model(IDS[0]).last_hidden_state)
