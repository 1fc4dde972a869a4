"""Tiny models of every kind, with random weights, and a tokenizer trained on the text that is on every machine."""

from __future__ import annotations

from typing import Any

import torch


def tiny_llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()


def tiny_qwen2(**changes: Any) -> Any:
    """Queries, keys and values have biases, and no setting says how large a head is."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
    return Qwen2ForCausalLM(Qwen2Config(**(sizes | changes))).eval()


def tiny_bert() -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return BertModel(config).eval()


def tiny_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=256)).eval()


def tiny_t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=512, d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


PAIR = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "pad_token_id": 1, "decoder_start_token_id": 2}  # fmt: skip
IMAGES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
          "patch_size": 8}  # fmt: skip


def tiny_bart() -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(BartConfig(vocab_size=512, max_position_embeddings=64, **PAIR)).eval()


def tiny_whisper() -> Any:
    """40 frames of the spectrum, 20 of the encoder."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    ends = {"bos_token_id": 2, "eos_token_id": 2, "suppress_tokens": None, "begin_suppress_tokens": None}
    sizes = {"vocab_size": 512, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32}
    return WhisperForConditionalGeneration(WhisperConfig(**PAIR, **sizes, **ends)).eval()


def tiny_vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_labels=5, **IMAGES)).eval()


def tiny_clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    text = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 32, "eos_token_id": 2, "bos_token_id": 2, "pad_token_id": 1}  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=IMAGES, projection_dim=16)).eval()


def tiny_gemma3() -> Any:
    """Sliding and global attention alternate: masks and rotary embeddings differ from block to block."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                              num_key_value_heads=2, head_dim=16, sliding_window=8, sliding_window_pattern=2,
                              max_position_embeddings=256)  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def tiny_mixtral(**changes: Any) -> Any:
    """Experts stacked in 3-D tensors."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 256}  # fmt: skip
    return MixtralForCausalLM(MixtralConfig(**(sizes | changes))).eval()


def token_batches(count: int = 4, length: int = 32, vocabulary: int = 512) -> list[torch.Tensor]:
    return [torch.randint(0, vocabulary, (2, length)) for _ in range(count)]


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from pyllmq.compression.calibration import builtin_paragraphs

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["[UNK]", "[PAD]", "[EOS]"], show_progress=False)
    tokenizer.train_from_iterator(builtin_paragraphs()[:200], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]")
