"""Fine-tunes what `loftq quantize` wrote, with TRL's SFTTrainer, from the directory's name.

    pip install trl
    loftq quantize --output demo-loftq
    python examples/finetune_sft.py demo-loftq --data train.jsonl --held-out other.jsonl -o trained

The data are lines of {"text": ...}, or of {"messages": [...]} where the tokenizer has a template.
`AutoPeftModelForCausalLM` reads in `loftq_init/` where the backbone is: the directory's name, so it
has to run beside that. No `peft_config` for the trainer: it would put a fresh adapter on a backbone
whose correction is in this one.
"""

import argparse
import os
from pathlib import Path

import torch
from datasets import load_dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="to train on")
    parser.add_argument("--held-out", type=Path, required=True, help="to evaluate on")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the trained adapter")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence at most")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    options = parser.parse_args()

    files = {"train": str(options.data.resolve()), "test": str(options.held_out.resolve())}
    data = load_dataset("json", data_files=files)
    output = options.output.resolve()
    directory = options.directory.resolve()
    os.chdir(directory.parent)
    trainer = SFTTrainer(
        AutoPeftModelForCausalLM.from_pretrained(f"{directory.name}/loftq_init", is_trainable=True),
        SFTConfig(
            output_dir=str(output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.learning_rate,
            max_length=options.length,
            bf16=torch.cuda.is_available(),  # TRL's default, which a CPU refuses
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=AutoTokenizer.from_pretrained(directory.name),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(output))
    print(f"held-out loss {before:.4f} -> {after:.4f}; the adapter is in {output}")


if __name__ == "__main__":
    main()
