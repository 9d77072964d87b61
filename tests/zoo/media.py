"""Images, video, speech and series of numbers, alone or with text."""

from __future__ import annotations

import torch

from tests.zoo.making import (
    BART_LIKE,
    BATTERY,
    BERT_LIKE,
    IMAGE_TOKEN,
    LLAMA_LIKE,
    SMALL,
    TEXT,
    VISION,
    VOCABULARY,
    Entry,
    answering,
    encoder,
    ended_text,
    entry,
    giving,
    image,
    noise,
    text,
    text_with_image,
    text_with_patches,
)

PARTS = {"vision_config": VISION, "text_config": BERT_LIKE}
MROPE = {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]}
PATCHES = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VOCABULARY - 1,
    "vision_start_token_id": VOCABULARY - 3,
    "vision_end_token_id": VOCABULARY - 4,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 64,
    "out_hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "patch_size": 8,
}
SPEECH = {
    **BART_LIKE,
    "max_source_positions": 64,
    "max_target_positions": 64,
    "num_mel_bins": 16,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
WAVEFORM = {
    **BERT_LIKE,
    "vocab_size": 32,
    "conv_dim": (64, 64),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}
LLAMA = {"model_type": "llama", **LLAMA_LIKE}
GPT2_DECODER = {**BATTERY["gpt2"].config, "add_cross_attention": True, "is_decoder": True}
BERT_DECODER = {"model_type": "bert", **BERT_LIKE, "add_cross_attention": True, "is_decoder": True}


def waveform() -> torch.Tensor:
    return noise(2, 1000)


IMAGES = {
    "ViT, classifier": BATTERY["vit"],
    "ViT, embeddings": entry("ViTModel", VISION, image),
    "ViT, masked": entry("ViTForMaskedImageModeling", VISION, image),
    "BEiT, classifier": entry("BeitForImageClassification", {**VISION, "num_labels": 5}, image),
    "DINOv2, classifier": entry("Dinov2ForImageClassification", {**VISION, "num_labels": 5}, image),
    "Swin, classifier": entry(
        "SwinForImageClassification",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 32,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "window_size": 4,
            "num_labels": 5,
        },
        image,
    ),
    "SegFormer": entry(
        "SegformerForSemanticSegmentation",
        {
            "hidden_sizes": [32, 64],
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "num_attention_heads": [1, 2],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 64,
            "num_labels": 5,
        },
        image,
    ),
    "YOLOS": entry(
        "YolosForObjectDetection",
        {**VISION, "image_size": [32, 32], "num_detection_tokens": 4},
        image,
    ),
    "VideoMAE, classifier": entry(
        "VideoMAEForVideoClassification",
        {**VISION, "num_frames": 4, "num_labels": 5},
        giving(pixel_values=lambda: noise(2, 4, 3, 32, 32)),
    ),
    "CLIP": entry(
        "CLIPModel", {**PARTS, "projection_dim": 64}, lambda: {**ended_text(), **image()}
    ),
    "CLIP, classifier": entry("CLIPForImageClassification", {**PARTS, "num_labels": 5}, image),
    "CLIP, text": encoder("CLIPTextModel", inputs=ended_text),
    "SigLIP": entry("SiglipModel", PARTS, lambda: {**text(), **image()}),
    "SigLIP, classifier": entry("SiglipForImageClassification", {**PARTS, "num_labels": 5}, image),
    "LLaVA": entry(
        "LlavaForConditionalGeneration",
        {
            "text_config": LLAMA,
            "vision_config": {"model_type": "clip_vision_model", **VISION, "projection_dim": 64},
            "image_token_index": IMAGE_TOKEN,
        },
        text_with_image(16),
    ),
    "Qwen2-VL": entry(
        "Qwen2VLForConditionalGeneration",
        {
            **PATCHES,
            "text_config": {**LLAMA_LIKE, "rope_scaling": MROPE},
            "vision_config": {**QWEN_VISION, "embed_dim": 64, "mlp_ratio": 2},
        },
        text_with_patches,
    ),
    "Qwen2.5-VL": entry(
        "Qwen2_5_VLForConditionalGeneration",
        {
            **PATCHES,
            "text_config": {**LLAMA_LIKE, "rope_scaling": MROPE},
            "vision_config": {**QWEN_VISION, "window_size": 32, "fullatt_block_indexes": [1]},
        },
        text_with_patches,
    ),
    "Qwen3-VL": entry(
        "Qwen3VLForConditionalGeneration",
        {
            **PATCHES,
            "text_config": {**LLAMA_LIKE, "head_dim": 16, "rope_scaling": MROPE},
            "vision_config": {
                **QWEN_VISION,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        },
        text_with_patches,
    ),
    "Gemma 3, images": entry(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**LLAMA_LIKE, "head_dim": 16},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE_TOKEN,
            "boi_token_index": VOCABULARY - 3,
            "eoi_token_index": VOCABULARY - 4,
        },
        text_with_image(4, token_type_ids=lambda: torch.zeros(2, 24, dtype=torch.long)),
    ),
    "PaliGemma": entry(
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": {"model_type": "gemma", **LLAMA_LIKE, "head_dim": 16},
            "vision_config": VISION,
            "image_token_index": IMAGE_TOKEN,
            "projection_dim": 64,
        },
        text_with_image(16, token_type_ids=lambda: torch.zeros(2, 24, dtype=torch.long)),
    ),
    "Idefics3": entry(
        "Idefics3ForConditionalGeneration",
        {
            "text_config": LLAMA,
            "vision_config": VISION,
            "image_token_id": IMAGE_TOKEN,
            "scale_factor": 2,
            "pad_token_id": 0,
        },
        text_with_image(4, 2, 1, 3, 32, 32),
    ),
    "InternVL": entry(
        "InternVLForConditionalGeneration",
        {
            "text_config": {"model_type": "qwen2", **LLAMA_LIKE},
            "vision_config": {**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
            "image_token_id": IMAGE_TOKEN,
        },
        text_with_image(4),
    ),
    "Mistral 3, images": entry(
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {"model_type": "mistral", **LLAMA_LIKE},
            "vision_config": {"model_type": "pixtral", **VISION, "head_dim": 16},
            "image_token_index": IMAGE_TOKEN,
            "spatial_merge_size": 2,
        },
        text_with_image(4, image_sizes=lambda: torch.tensor([[32, 32], [32, 32]])),
    ),
    "Mllama": entry(
        "MllamaForConditionalGeneration",
        {
            "text_config": {
                **LLAMA_LIKE,
                "cross_attention_layers": [1],
                "rope_scaling": {"rope_type": "default"},
            },
            "vision_config": {
                **SMALL,
                "attention_heads": 4,
                "num_global_layers": 1,
                "image_size": 32,
                "patch_size": 8,
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
                "vision_output_dim": 128,
                "intermediate_layers_indices": [0],
            },
        },
        text_with_image(
            0,
            *(2, 1, 1, 3, 32, 32),
            aspect_ratio_ids=lambda: torch.ones(2, 1, dtype=torch.long),
            aspect_ratio_mask=lambda: torch.ones(2, 1, 1, dtype=torch.long),
            cross_attention_mask=lambda: torch.ones(2, 24, 1, 1, dtype=torch.long),
        ),
    ),
    "BLIP-2": entry(
        "Blip2ForConditionalGeneration",
        {
            "text_config": {
                "model_type": "opt",
                **BATTERY["opt"].config,
                "word_embed_proj_dim": 64,
            },
            "vision_config": VISION,
            "qformer_config": {**BERT_LIKE, "encoder_hidden_size": 64},
            "num_query_tokens": 4,
            "image_token_index": IMAGE_TOKEN,
        },
        text_with_image(4),
    ),
    "ViT to GPT-2": Entry(
        "VisionEncoderDecoderModel",
        "VisionEncoderDecoderConfig",
        {
            "encoder": {"model_type": "vit", **VISION},
            "decoder": {"model_type": "gpt2", **GPT2_DECODER},
            "decoder_start_token_id": 1,
            "pad_token_id": 0,
        },
        answering(pixel_values=lambda: noise(2, 3, 32, 32)),
    ),
}

SOUNDS = {
    "Whisper": entry(
        "WhisperForConditionalGeneration",
        SPEECH,
        answering(input_features=lambda: noise(2, 16, 128)),
    ),
    "Whisper, classifier": entry(
        "WhisperForAudioClassification",
        {**SPEECH, "classifier_proj_size": 64},
        giving(input_features=lambda: noise(2, 16, 128)),
    ),
    "Speech2Text": entry(
        "Speech2TextForConditionalGeneration",
        {**SPEECH, "input_feat_per_channel": 16},
        answering(input_features=lambda: noise(2, 128, 16)),
    ),
    "Moonshine": entry(
        "MoonshineForConditionalGeneration",
        {
            **TEXT,
            "hidden_size": 64,
            "intermediate_size": 128,
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 1,
        },
        answering(input_values=lambda: noise(2, 2000)),
    ),
    "Wav2Vec2, CTC": entry("Wav2Vec2ForCTC", WAVEFORM, giving(input_values=waveform)),
    "Wav2Vec2, classifier": entry(
        "Wav2Vec2ForSequenceClassification",
        {**WAVEFORM, "classifier_proj_size": 64},
        giving(input_values=waveform),
    ),
    "Wav2Vec2, embeddings": entry("Wav2Vec2Model", WAVEFORM, giving(input_values=waveform)),
    "HuBERT, CTC": entry("HubertForCTC", WAVEFORM, giving(input_values=waveform)),
    "WavLM, CTC": entry("WavLMForCTC", WAVEFORM, giving(input_values=waveform)),
    "Data2Vec, CTC": entry("Data2VecAudioForCTC", WAVEFORM, giving(input_values=waveform)),
    "AST, classifier": entry(
        "ASTForAudioClassification",
        {**SMALL, "max_length": 64, "num_mel_bins": 32},
        giving(input_values=lambda: noise(2, 64, 32)),
    ),
    "Wav2Vec2 to BERT": Entry(
        "SpeechEncoderDecoderModel",
        "SpeechEncoderDecoderConfig",
        {
            "encoder": {"model_type": "wav2vec2", **WAVEFORM},
            "decoder": BERT_DECODER,
            "decoder_start_token_id": 1,
            "pad_token_id": 0,
        },
        answering(input_values=waveform),
    ),
    "MusicGen, decoder": entry(
        "MusicgenForCausalLM",
        {**SMALL, "vocab_size": VOCABULARY, "ffn_dim": 128, "num_codebooks": 2},
        giving(input_ids=lambda: text()["input_ids"].repeat(2, 1)),
        kind="MusicgenDecoder",
    ),
    "PatchTST": entry(
        "PatchTSTForPrediction",
        {
            **SMALL,
            "d_model": 64,
            "ffn_dim": 128,
            "context_length": 32,
            "prediction_length": 4,
            "patch_length": 4,
            "patch_stride": 4,
            "num_input_channels": 2,
        },
        giving(past_values=lambda: noise(2, 32, 2)),
    ),
}
