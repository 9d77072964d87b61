"""Fine-tunes what `loftq quantize` wrote, with transformers' Trainer.

    loftq quantize --output demo-loftq
    python examples/finetune.py demo-loftq --text train.txt --held-out held-out.txt -o trained

Prints the held-out loss (nats a token) before and after, and saves the adapter. On two cores a step
of the built-in model takes seconds: begin with `--steps 20 --batch 2`. Only the adapter is
trained; where the backbone is kept in other containers than bitsandbytes', `README.md` in the
directory says how it is loaded.
"""

import argparse
from pathlib import Path

from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
)


def windows(tokenizer, text: Path, length: int) -> list[dict]:
    """The text in pieces of so many tokens, each its own label."""
    tokens = tokenizer(text.read_text(encoding="utf-8"), verbose=False).input_ids
    pieces = [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)]
    if not pieces:
        raise SystemExit(f"{text} has {len(tokens)} tokens: --length takes at least one piece")
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="to train on")
    parser.add_argument("--held-out", type=Path, required=True, help="to evaluate on")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the trained adapter")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.directory)
    train, held_out = (
        windows(tokenizer, text, options.length) for text in (options.text, options.held_out)
    )
    model = AutoModelForCausalLM.from_pretrained(options.directory)
    for layer in model.modules():  # before anything else: the directory's README says why
        layer.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(
        model, options.directory, subfolder="loftq_init", is_trainable=True
    )
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.learning_rate,
            save_strategy="no",
            report_to=[],
            logging_steps=max(options.steps // 20, 1),
        ),
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=default_data_collator,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    model.save_pretrained(options.output)
    print(f"held-out loss {before:.4f} -> {after:.4f}; the adapter is in {options.output}")


if __name__ == "__main__":
    main()
