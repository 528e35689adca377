"""Model families of transformers as tiny models with random weights, made on the spot: no network, no data.

Each family keeps what makes it a kind of its own, at a size at which it shows: windows of `WINDOW` tokens where it has sliding
attention (texts are longer), layers of each of its attentions, four experts, two groups of layers that share weights.
Weights are drawn wide, so that logits differ by far more than rounding. Dropout that is no module of its own is off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tests.support.tiny_models import WORDS, save_random_model, save_word_tokenizer

Kind: TypeAlias = Literal[
    "encoder",
    "decoder",
    "mixed attention",
    "mixture of experts",
    "state space",
    "linear attention",
    "encoder-decoder",
    "vision-language",
]

WINDOW = 4
"""Tokens that a layer with sliding attention sees."""
BLOCKS = 4
"""Transformer blocks of a family, unless its `sizes` say otherwise."""
VOCABULARY = len(WORDS) + 4
"""Words and four marks."""


@dataclass(frozen=True, slots=True)
class Family:
    """One family at a tiny size.

    Fields:
        name: how it is called in tables.
        kind: what it has in common with others.
        config: name of its configuration class in transformers.
        model: name of the model class that is saved: encoders without a head, decoders with theirs.
        sizes: arguments of the configuration.
        tokenizer: a key of `TOKENIZERS`.
    """

    name: str
    kind: Kind
    config: str
    model: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = "decoder"

    def config_class(self) -> Any:
        """The configuration class."""
        import transformers

        return getattr(transformers, self.config)

    def save(self, folder: Path) -> Path:
        """Write model and tokenizer, always with the same random weights."""
        import transformers

        save_word_tokenizer(folder, **TOKENIZERS[self.tokenizer])
        return save_random_model(folder, getattr(transformers, self.model), self.config_class()(**self.sizes))


def _marks(**names: str) -> dict[str, Any]:
    return {f"{role}_token": mark for role, mark in names.items()}


TOKENIZERS: Mapping[str, Mapping[str, Any]] = {
    "encoder": {
        "marks": ("[PAD]", "[UNK]", "[CLS]", "[SEP]"),
        "names": _marks(pad="[PAD]", unk="[UNK]", cls="[CLS]", sep="[SEP]")
        | {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]},
        "single": "[CLS] $A [SEP]",
        "pair": "[CLS] $A [SEP] $B:1 [SEP]:1",
    },
    "roberta": {
        "marks": ("<s>", "<pad>", "</s>", "<unk>"),
        "names": _marks(bos="<s>", pad="<pad>", eos="</s>", unk="<unk>", cls="<s>", sep="</s>"),
        "single": "<s> $A </s>",
        "pair": "<s> $A </s> </s> $B </s>",
    },
    "xlnet": {
        "marks": ("<unk>", "<sep>", "<cls>", "<pad>"),
        "names": _marks(unk="<unk>", sep="<sep>", cls="<cls>", pad="<pad>")
        | {"padding_side": "left", "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]},
        "single": "$A <sep> <cls>:2",
        "pair": "$A <sep> $B:1 <sep>:1 <cls>:2",
    },
    "decoder": {
        "marks": ("<unk>", "<s>", "</s>", "<pad>"),
        "names": _marks(unk="<unk>", bos="<s>", eos="</s>", pad="<pad>"),
        "single": "<s> $A",
        "pair": "<s> $A $B",
    },
    "encoder-decoder": {
        "marks": ("<pad>", "</s>", "<unk>", "<s>"),
        "names": _marks(pad="<pad>", eos="</s>", unk="<unk>"),
        "single": "$A </s>",
        "pair": "$A </s> $B </s>",
    },
}
"""Tokenizers by the order of their marks and what they put around a text."""


_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
_ROBERTA = _ENCODER | {
    "max_position_embeddings": 66,
    "type_vocab_size": 1,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_OLD_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_LINEAR_AND_FULL: dict[str, Any] = {
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GEMMA: dict[str, Any] = _DECODER | {"head_dim": 8}
_SIX = 6
"""Blocks of Gemma 3, whose first five see a window and whose sixth sees everything."""
_GEMMA_3 = _GEMMA | {"num_hidden_layers": _SIX, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}
_MAMBA = _OLD_DECODER | {"hidden_size": 32, "num_hidden_layers": BLOCKS, "state_size": 8, "tie_word_embeddings": False}
_DEBERTA = _ENCODER | {"relative_attention": True, "max_relative_positions": 16, "pos_att_type": "p2c|c2p"}


def _encoder(name: str, model: str, tokenizer: str = "encoder", **sizes: Any) -> Family:
    return Family(name, "encoder", model.replace("Model", "Config"), model, sizes, tokenizer)


def _decoder(name: str, stem: str, kind: Kind = "decoder", **sizes: Any) -> Family:
    return Family(name, kind, f"{stem}Config", f"{stem}ForCausalLM", sizes)


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        _encoder("BERT", "BertModel", **_ENCODER),
        _encoder("RoBERTa", "RobertaModel", "roberta", **_ROBERTA),
        _encoder("XLM-R", "XLMRobertaModel", "roberta", **_ROBERTA),
        _encoder("ELECTRA", "ElectraModel", **_ENCODER, embedding_size=16),
        _encoder(
            "DistilBERT",
            "DistilBertModel",
            vocab_size=VOCABULARY,
            dim=32,
            n_layers=BLOCKS,
            n_heads=4,
            hidden_dim=64,
            max_position_embeddings=64,
            initializer_range=0.2,
            pad_token_id=0,
        ),
        _encoder("ALBERT", "AlbertModel", **_ENCODER, embedding_size=16),
        _encoder("MPNet", "MPNetModel", "roberta", **_ROBERTA),
        _encoder(
            "ModernBERT",
            "ModernBertModel",
            **_ENCODER,
            local_attention=WINDOW,
            global_attn_every_n_layers=2,
            cls_token_id=2,
            sep_token_id=3,
        ),
        _encoder("ConvBERT", "ConvBertModel", **_ENCODER, embedding_size=32),
        _encoder("DeBERTa", "DebertaModel", **_DEBERTA, type_vocab_size=0, position_biased_input=False),
        _encoder("DeBERTa-v2", "DebertaV2Model", **_DEBERTA, type_vocab_size=2, conv_kernel_size=3),
        _encoder(
            "DeBERTa-v3",
            "DebertaV2Model",
            **_DEBERTA,
            type_vocab_size=0,
            position_biased_input=False,
            share_att_key=True,
            position_buckets=8,
            norm_rel_ebd="layer_norm",
        ),
        _encoder(
            "XLNet",
            "XLNetModel",
            "xlnet",
            vocab_size=VOCABULARY,
            d_model=32,
            n_layer=BLOCKS,
            n_head=4,
            d_inner=64,
            initializer_range=0.2,
            pad_token_id=3,
        ),
        Family(
            "GPT-2",
            "decoder",
            "GPT2Config",
            "GPT2LMHeadModel",
            _OLD_DECODER | {"n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64},
        ),
        _decoder("GPT-J", "GPTJ", **_OLD_DECODER, n_embd=32, n_layer=BLOCKS, n_head=4, n_positions=64, rotary_dim=4),
        _decoder(
            "GPT-Neo",
            "GPTNeo",
            "mixed attention",
            **_OLD_DECODER,
            hidden_size=32,
            num_layers=BLOCKS,
            num_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
            window_size=WINDOW,
            attention_types=[[["global", "local"], 2]],
        ),
        _decoder("GPT-NeoX", "GPTNeoX", **{k: v for k, v in _DECODER.items() if k != "num_key_value_heads"}),
        _decoder(
            "OPT",
            "OPT",
            vocab_size=VOCABULARY,
            hidden_size=32,
            word_embed_proj_dim=32,
            num_hidden_layers=BLOCKS,
            num_attention_heads=4,
            ffn_dim=64,
            max_position_embeddings=64,
            init_std=0.2,
            dropout=0.0,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        ),
        _decoder("BLOOM", "Bloom", **_OLD_DECODER, hidden_size=32, n_layer=BLOCKS, n_head=4),
        _decoder("Falcon", "Falcon", **_OLD_DECODER, hidden_size=32, num_hidden_layers=BLOCKS, num_attention_heads=4),
        _decoder("MPT", "Mpt", **_OLD_DECODER, d_model=32, n_layers=BLOCKS, n_heads=4, max_seq_len=64),
        _decoder("Llama", "Llama", **_DECODER),
        _decoder("Mistral", "Mistral", **_DECODER, sliding_window=WINDOW),
        _decoder("Qwen2", "Qwen2", **_DECODER),
        _decoder(
            "Qwen2, sliding window",
            "Qwen2",
            "mixed attention",
            **_DECODER,
            use_sliding_window=True,
            sliding_window=WINDOW,
            max_window_layers=2,
        ),
        _decoder("Qwen3", "Qwen3", **_DECODER, head_dim=8),
        Family(
            "Qwen3.5",
            "linear attention",
            "Qwen3_5TextConfig",
            "Qwen3_5ForCausalLM",
            _DECODER | _LINEAR_AND_FULL,
        ),
        Family(
            "Qwen3.5, linear alone",
            "linear attention",
            "Qwen3_5TextConfig",
            "Qwen3_5ForCausalLM",
            _DECODER | _LINEAR_AND_FULL | {"layer_types": ["linear_attention"] * 2, "num_hidden_layers": 2},
        ),
        _decoder(
            "Qwen3-Next",
            "Qwen3Next",
            "linear attention",
            **_DECODER
            | _LINEAR_AND_FULL
            | _EXPERTS
            | {"num_experts_per_tok": 4, "num_hidden_layers": 3}
            | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
            shared_expert_intermediate_size=16,
        ),
        _decoder("Phi-2", "Phi", **_DECODER),
        _decoder("Phi-3", "Phi3", **_DECODER, sliding_window=WINDOW),
        _decoder("Gemma", "Gemma", **_GEMMA),
        _decoder("Gemma 2", "Gemma2", "mixed attention", **_GEMMA, sliding_window=WINDOW, query_pre_attn_scalar=8),
        Family("Gemma 3", "mixed attention", "Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA_3),
        _decoder(
            "gpt-oss",
            "GptOss",
            "mixed attention",
            **_DECODER,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=WINDOW,
            layer_types=_ALTERNATING,
        ),
        _decoder(
            "SmolLM3",
            "SmolLM3",
            "mixed attention",
            **_DECODER,
            use_sliding_window=True,
            sliding_window=WINDOW,
            layer_types=_ALTERNATING,
            no_rope_layers=[1, 1, 1, 0],
        ),
        _decoder("Granite", "Granite", **_DECODER),
        _decoder("OLMo2", "Olmo2", **_DECODER),
        _decoder("OLMo3", "Olmo3", "mixed attention", **_DECODER, sliding_window=WINDOW, layer_types=_ALTERNATING),
        _decoder("Cohere2", "Cohere2", "mixed attention", **_DECODER, sliding_window=WINDOW, layer_types=_ALTERNATING),
        _decoder("Mixtral", "Mixtral", "mixture of experts", **_DECODER, num_local_experts=4, num_experts_per_tok=2),
        _decoder("Qwen3-MoE", "Qwen3Moe", "mixture of experts", **_DECODER | _EXPERTS, head_dim=8),
        _decoder("Mamba", "Mamba", "state space", **_MAMBA, time_step_rank=8),
        _decoder(
            "Mamba 2", "Mamba2", "state space", **_MAMBA, num_heads=8, head_dim=8, expand=2, n_groups=2, chunk_size=8
        ),
        Family(
            "T5",
            "encoder-decoder",
            "T5Config",
            "T5ForConditionalGeneration",
            {
                "vocab_size": VOCABULARY,
                "d_model": 32,
                "d_kv": 8,
                "d_ff": 64,
                "num_layers": BLOCKS,
                "num_heads": 4,
                "pad_token_id": 0,
                "eos_token_id": 1,
                "decoder_start_token_id": 0,
                "initializer_factor": 1.0,
                "dropout_rate": 0.0,
            },
            "encoder-decoder",
        ),
        Family(
            "BART",
            "encoder-decoder",
            "BartConfig",
            "BartForConditionalGeneration",
            {
                "vocab_size": VOCABULARY,
                "d_model": 32,
                "encoder_layers": BLOCKS,
                "decoder_layers": BLOCKS,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "encoder_ffn_dim": 64,
                "decoder_ffn_dim": 64,
                "max_position_embeddings": 64,
                "init_std": 0.2,
                "dropout": 0.0,
                "bos_token_id": 0,
                "pad_token_id": 1,
                "eos_token_id": 2,
                "decoder_start_token_id": 2,
                "forced_eos_token_id": 2,
            },
            "roberta",
        ),
        Family(
            "Gemma 3, vision",
            "vision-language",
            "Gemma3Config",
            "Gemma3ForConditionalGeneration",
            {
                "text_config": _GEMMA_3 | {"pad_token_id": None},
                "vision_config": {
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "image_size": 16,
                    "patch_size": 4,
                },
                "mm_tokens_per_image": 4,
                "boi_token_index": 0,
                "eoi_token_index": 0,
                "image_token_index": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 3,
            },
        ),
    )
}
"""The families by name."""
