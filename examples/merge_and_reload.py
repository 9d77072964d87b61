"""Trains an adapter for some steps, merges it, and loads the result as the plain model that it is.

    loftq quantize --output demo-loftq
    python examples/merge_and_reload.py demo-loftq --text train.txt --held-out held-out.txt -o out

Prints the held-out loss (nats a token) before and after the training, and that of the merged model,
which has no adapter and is not quantized: the same but for the rounding of its weights.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def windows(tokenizer, text: Path, length: int) -> torch.Tensor:
    """The text in pieces of so many tokens: (pieces, length)."""
    tokens = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    if len(tokens) < length:
        raise SystemExit(f"{text} has {len(tokens)} tokens: --length takes at least one piece")
    return tokens[: len(tokens) // length * length].view(-1, length)


@torch.no_grad()
def loss(model, pieces: torch.Tensor) -> float:
    """The mean loss of all pieces."""
    model.eval()
    found = [model(input_ids=piece[None], labels=piece[None]).loss for piece in pieces]
    return float(torch.stack(found).mean())


def train(model, pieces: torch.Tensor, steps: int, batch: int, learning_rate: float) -> None:
    """Only what PEFT has made trainable gets a gradient."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    for step in range(steps):
        chosen = pieces[torch.arange(step * batch, (step + 1) * batch) % len(pieces)]
        model(input_ids=chosen, labels=chosen).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="to train on")
    parser.add_argument("--held-out", type=Path, required=True, help="to evaluate on")
    parser.add_argument("-o", "--output", type=Path, required=True, help="adapter and merged model")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.directory)
    text, held_out = (
        windows(tokenizer, each, options.length) for each in (options.text, options.held_out)
    )
    model = AutoModelForCausalLM.from_pretrained(options.directory)
    for layer in model.modules():  # before anything else: the directory's README says why
        layer.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(
        model, options.directory, subfolder="loftq_init", is_trainable=True
    )
    before = loss(model, held_out)
    train(model, text, options.steps, options.batch, options.learning_rate)
    after = loss(model, held_out)
    adapter, merged = options.output / "adapter", options.output / "merged"
    model.save_pretrained(adapter)

    # `loftq merge DIR --adapter TRAINED --output MERGED`
    command = ["merge", options.directory, "--adapter", adapter, "--output", merged, "--quiet"]
    subprocess.run([sys.executable, "-m", "loftq_cli", *map(str, command)], check=True)
    reloaded = loss(AutoModelForCausalLM.from_pretrained(merged), held_out)
    print(f"held-out loss {before:.4f} -> {after:.4f}; merged into {merged} it is {reloaded:.4f}")


if __name__ == "__main__":
    main()
