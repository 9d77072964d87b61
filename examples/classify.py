"""Fine-tunes a quantized BERT (or any model with such a head) to classify sentences, as GLUE does.

    loftq quantize --model google-bert/bert-base-uncased --output bert-loftq
    python examples/classify.py bert-loftq --data train.tsv --held-out dev.tsv -o trained

The data are lines of a label, a tab, a sentence, and for pairs a tab and another. The head is
fresh: PEFT trains it and saves it with the adapter. Prints the held-out accuracy before and after.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)


def examples(tokenizer, file: Path, labels: list[str], length: int) -> list[dict]:
    """Tokens and the number of the label, of every line."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        label, *sentences = line.split("\t")
        tokens = tokenizer(*sentences, truncation=True, max_length=length)
        found.append({**tokens, "labels": labels.index(label)})
    return found


def load(directory: Path, labels: list[str]) -> torch.nn.Module:
    """The backbone with a fresh head, and on it the adapter's start."""
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=len(labels))
    for layer in model.modules():  # before anything else: the directory's README says why
        layer.support_avx512bf16_for_cpu = False
    config = LoraConfig.from_pretrained(directory, subfolder="loftq_init")
    config.task_type, config.base_model_name_or_path = "SEQ_CLS", str(directory)
    model = get_peft_model(model, config)
    state = get_peft_model_state_dict(model)  # with the head
    state |= load_file(directory / "loftq_init" / "adapter_model.safetensors")
    set_peft_model_state_dict(model, state)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="to train on")
    parser.add_argument("--held-out", type=Path, required=True, help="to evaluate on")
    parser.add_argument("-o", "--output", type=Path, required=True, help="adapter and head")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sentence at most")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    options = parser.parse_args()

    lines = options.data.read_text(encoding="utf-8").splitlines()
    labels = sorted({line.split("\t")[0] for line in lines})
    directory = options.directory.resolve()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    trainer = Trainer(
        load(directory, labels),
        TrainingArguments(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.learning_rate,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=examples(tokenizer, options.data, labels, options.length),
        eval_dataset=examples(tokenizer, options.held_out, labels, options.length),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: {
            "accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())
        },
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    trainer.model.save_pretrained(options.output)
    print(f"held-out accuracy {before:.3f} -> {after:.3f}; the adapter is in {options.output}")


if __name__ == "__main__":
    main()
