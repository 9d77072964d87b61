"""Encoders of text, and what answers text with text."""

from __future__ import annotations

from tests.zoo.making import (
    BART_LIKE,
    BATTERY,
    BERT_LIKE,
    T5_LIKE,
    TEXT,
    Entry,
    encoder,
    ended_text,
    entry,
    text_to_text,
)

CLS = {"cls_token_id": 1, "sep_token_id": 2}
BERT = {"model_type": "bert", **BERT_LIKE}
BERT_DECODER = {**BERT, "is_decoder": True, "add_cross_attention": True}
NO_LAYERDROP = {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}


def answers(model: str, kind: str = "", **config: object) -> Entry:
    """An encoder and decoder whose config has BART's names."""
    return entry(model, {**BART_LIKE, **config}, text_to_text, kind)


ENCODERS = {
    "BERT": encoder("BertForMaskedLM"),
    "BERT, classifier": BATTERY["bert"],
    "BERT, tokens": encoder("BertForTokenClassification", num_labels=3),
    "BERT, questions": encoder("BertForQuestionAnswering"),
    "BERT, next sentence": encoder("BertForNextSentencePrediction"),
    "BERT, pretraining": encoder("BertForPreTraining"),
    "BERT, embeddings": encoder("BertModel"),
    "BERT, decoder": encoder("BertLMHeadModel", is_decoder=True),
    "RoBERTa": encoder("RobertaForMaskedLM"),
    "RoBERTa, classifier": encoder("RobertaForSequenceClassification", num_labels=3),
    "XLM-RoBERTa-XL": encoder("XLMRobertaXLForMaskedLM"),
    "ELECTRA": encoder("ElectraForMaskedLM", embedding_size=64),
    "ELECTRA, discriminator": encoder("ElectraForPreTraining", embedding_size=64),
    "ELECTRA, classifier": encoder(
        "ElectraForSequenceClassification", embedding_size=64, num_labels=3
    ),
    "DeBERTa": encoder("DebertaForMaskedLM", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "DeBERTa-v2": encoder("DebertaV2ForMaskedLM"),
    "DeBERTa-v2, classifier": BATTERY["deberta_v2"],
    "ALBERT": encoder("AlbertForMaskedLM", embedding_size=64),
    "ALBERT, classifier": encoder(
        "AlbertForSequenceClassification", embedding_size=64, num_labels=3
    ),
    "MobileBERT": encoder(
        "MobileBertForMaskedLM", embedding_size=64, intra_bottleneck_size=64, true_hidden_size=64
    ),
    "MPNet, embeddings": encoder("MPNetModel"),
    "DPR, questions": encoder("DPRQuestionEncoder", "DPR"),
    "ESM": encoder("EsmForMaskedLM", mask_token_id=3),
    "ModernBERT": encoder("ModernBertForMaskedLM", **CLS),
    "ModernBERT, classifier": encoder("ModernBertForSequenceClassification", **CLS, num_labels=3),
    "DistilBERT, classifier": entry(
        "DistilBertForSequenceClassification",
        {**TEXT, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "num_labels": 3},
    ),
    "Longformer": encoder("LongformerForMaskedLM", attention_window=[8, 8]),
    "BigBird": encoder("BigBirdForMaskedLM", attention_type="original_full"),
    "Funnel": entry(
        "FunnelForMaskedLM",
        {
            **TEXT,
            "d_model": 64,
            "n_head": 4,
            "d_head": 16,
            "d_inner": 128,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
        },
    ),
    "LayoutLM, tokens": encoder("LayoutLMForTokenClassification", num_labels=3),
}

SEQUENCES = {
    "T5": BATTERY["t5"],
    "T5, encoder": entry("T5EncoderModel", T5_LIKE, kind="T5"),
    "T5, classifier": entry(
        "T5ForSequenceClassification",
        {**T5_LIKE, "num_labels": 3, "eos_token_id": 2, "pad_token_id": 0},
        ended_text,
    ),
    "mT5": entry(
        "MT5ForConditionalGeneration", {**T5_LIKE, "tie_word_embeddings": False}, text_to_text
    ),
    "Switch": entry(
        "SwitchTransformersForConditionalGeneration",
        {
            **T5_LIKE,
            "num_experts": 4,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
        },
        text_to_text,
    ),
    "BART": BATTERY["bart"],
    "BART, classifier": entry(
        "BartForSequenceClassification", {**BART_LIKE, "num_labels": 3}, ended_text
    ),
    "mBART": answers("MBartForConditionalGeneration"),
    "Marian": answers("MarianMTModel", "Marian"),
    "Pegasus": answers("PegasusForConditionalGeneration"),
    "Blenderbot": answers("BlenderbotForConditionalGeneration"),
    "M2M100": answers("M2M100ForConditionalGeneration", **NO_LAYERDROP),
    "NLLB-MoE": answers(
        "NllbMoeForConditionalGeneration",
        **NO_LAYERDROP,
        num_experts=4,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
    ),
    "LED": answers(
        "LEDForConditionalGeneration",
        attention_window=[8, 8],
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    ),
    "ProphetNet": entry(
        "ProphetNetForConditionalGeneration",
        {
            **TEXT,
            "hidden_size": 64,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 1,
        },
        text_to_text,
    ),
    "BERT to BERT": Entry(
        "EncoderDecoderModel",
        "EncoderDecoderConfig",
        {"encoder": BERT, "decoder": BERT_DECODER, "decoder_start_token_id": 1, "pad_token_id": 0},
        text_to_text,
    ),
}
