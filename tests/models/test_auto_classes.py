"""The class that opens a model and PEFT's task type, held against the libraries themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t
from transformers import PreTrainedModel

from loftq_cli import schema
from loftq_cli.models.architecture import read_architecture
from loftq_cli.models.auto_classes import auto_class, class_named, task_type
from loftq_cli.models.source import read_config
from loftq_cli.report.loading import auto_class as reported_class
from tests.battery import BERT_LIKE, LLAMA_LIKE, VOCABULARY
from tests.cli import documents

BART = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "decoder_start_token_id": 1, "forced_eos_token_id": None, "max_position_embeddings": 32,
}  # fmt: skip
SPEECH = {**BART, "max_source_positions": 32, "max_target_positions": 32}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
          "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
WAV = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
       "num_attention_heads": 2, "conv_dim": (16, 16), "conv_stride": (4, 4),
       "conv_kernel": (8, 4), "num_conv_pos_embeddings": 16,
       "num_conv_pos_embedding_groups": 2}  # fmt: skip


def llava() -> t.PreTrainedConfig:
    return t.LlavaConfig(
        text_config={"model_type": "llama", **LLAMA_LIKE},
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 32},
        image_token_index=90,
    )


def encoder_decoder() -> t.PreTrainedConfig:
    decoder = t.BertConfig(**BERT_LIKE, is_decoder=True, add_cross_attention=True)
    return t.EncoderDecoderConfig.from_encoder_decoder_configs(t.BertConfig(**BERT_LIKE), decoder)


CASES: list[tuple[str, t.PreTrainedConfig, str, str | None]] = [
    ("LlamaForCausalLM", t.LlamaConfig(**LLAMA_LIKE), "AutoModelForCausalLM", "CAUSAL_LM"),
    ("GPT2LMHeadModel", t.GPT2Config(n_embd=32, n_layer=1, n_head=2), "AutoModelForCausalLM",
     "CAUSAL_LM"),
    ("LlamaModel", t.LlamaConfig(**LLAMA_LIKE), "AutoModel", None),
    ("LlamaForSequenceClassification", t.LlamaConfig(**LLAMA_LIKE),
     "AutoModelForSequenceClassification", "SEQ_CLS"),
    ("BertForTokenClassification", t.BertConfig(**BERT_LIKE), "AutoModelForTokenClassification",
     "TOKEN_CLS"),
    ("BertForQuestionAnswering", t.BertConfig(**BERT_LIKE), "AutoModelForQuestionAnswering",
     "QUESTION_ANS"),
    ("BertForMaskedLM", t.BertConfig(**BERT_LIKE), "AutoModelForMaskedLM", None),
    ("BertModel", t.BertConfig(**BERT_LIKE), "AutoModel", None),
    ("BertForPreTraining", t.BertConfig(**BERT_LIKE), "AutoModelForPreTraining", None),
    ("BertForMultipleChoice", t.BertConfig(**BERT_LIKE), "AutoModelForMultipleChoice", None),
    ("GPT2DoubleHeadsModel", t.GPT2Config(n_embd=32, n_layer=1, n_head=2),
     "GPT2DoubleHeadsModel", None),
    ("BartForConditionalGeneration", t.BartConfig(**BART), "AutoModelForSeq2SeqLM",
     "SEQ_2_SEQ_LM"),
    ("BartForCausalLM", t.BartConfig(**BART), "AutoModelForCausalLM", "CAUSAL_LM"),
    ("EncoderDecoderModel", encoder_decoder(), "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    ("LlavaForConditionalGeneration", llava(), "AutoModelForImageTextToText", "CAUSAL_LM"),
    ("WhisperForConditionalGeneration", t.WhisperConfig(**SPEECH, num_mel_bins=8),
     "AutoModelForSpeechSeq2Seq", None),
    ("Speech2TextForConditionalGeneration", t.Speech2TextConfig(**SPEECH),
     "AutoModelForSpeechSeq2Seq", None),
    ("Wav2Vec2ForCTC", t.Wav2Vec2Config(**WAV), "AutoModelForCTC", None),
    ("Wav2Vec2ForSequenceClassification", t.Wav2Vec2Config(**WAV),
     "AutoModelForAudioClassification", None),
    ("ViTForImageClassification", t.ViTConfig(**VISION), "AutoModelForImageClassification", None),
    ("CLIPModel", t.CLIPConfig(), "AutoModelForZeroShotImageClassification", None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config", "auto", "task"), CASES, ids=[name for name, *_ in CASES]
)
def test_the_class_and_the_task(
    name: str, config: t.PreTrainedConfig, auto: str, task: str | None
) -> None:
    with torch.device("meta"):
        model: PreTrainedModel = getattr(t, name)(config)
    assert (auto_class(model), task_type(auto, model)) == (auto, task)
    opener = class_named(auto)
    if opener is not getattr(t, name):
        with torch.device("meta"):
            config.architectures = [name]
            assert type(opener.from_config(config)) is getattr(t, name)


@pytest.mark.parametrize(
    ("task", "name", "passed"),
    [
        ("CAUSAL_LM", "PeftModelForCausalLM", {}),
        ("SEQ_2_SEQ_LM", "PeftModelForSeq2SeqLM", {}),
        ("SEQ_CLS", "PeftModelForSequenceClassification", {}),
        ("TOKEN_CLS", "PeftModelForTokenClassification", {}),
        ("QUESTION_ANS", "PeftModelForQuestionAnswering", {}),
    ],
)
def test_peft_passes_what_it_is_said_to_pass(task: str, name: str, passed: dict[str, Any]) -> None:
    """Its wrapper's own call, on a module that takes anything: no more names, and no fewer."""
    from loftq_cli.models import auto_classes

    class Anything(torch.nn.Module):
        config = t.BertConfig(**BERT_LIKE)

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def prepare_inputs_for_generation(self) -> None: ...

        def _prepare_encoder_decoder_kwargs_for_generation(self) -> None: ...

        def forward(self, **given: Any) -> None:
            passed.update(given)

    wrapped = getattr(peft, name)(Anything(), peft.LoraConfig(target_modules=["layer"]))
    wrapped(input_ids=torch.ones(1, 1))
    assert set(passed) == auto_classes._ALWAYS_PASSED | auto_classes._PASSED[task]


def test_code_of_the_checkpoint_is_opened_as_its_config_says(tmp_path: Path) -> None:
    (tmp_path / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        "class OwnModel(OwnForCausalLM): ...\n"
    )
    content = {
        **LLAMA_LIKE, "model_type": "own", "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(content))
    architecture = read_architecture(tmp_path, read_config(tmp_path), trust_remote_code=True)
    assert architecture.own_code
    assert architecture.auto_class == "AutoModelForCausalLM"
    assert architecture.task_type == "CAUSAL_LM"


@pytest.mark.parametrize(
    "name", ["Trainer", "pipeline", "AutoTokenizer", "BertConfig", "os", "__class__", "x y", ""]
)
def test_no_other_name_is_a_class_to_load_with(name: str) -> None:
    assert class_named(name) is None


def test_an_older_report_goes_by_the_task() -> None:
    data = documents.quantize()
    assert reported_class(schema.document_of(data).results) == "AutoModelForCausalLM"
    data["results"]["task_type"] = None
    assert reported_class(schema.document_of(data).results) == "GPT2LMHeadModel"
    data["results"]["auto_class"] = "AutoModelForCTC"
    assert reported_class(schema.document_of(data).results) == "AutoModelForCTC"
    data["results"]["auto_class"] = "os; os.remove('x')\n"
    assert reported_class(schema.document_of(data).results) == "AutoModel"
