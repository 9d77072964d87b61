"""Train `demo`, the small language model that ships inside `loftq`.

It is a GPT-2 of 4.3 million parameters that has read the Python standard library of the
interpreter running this script: no download, no accelerator, an hour on two CPU cores.

    python examples/train_demo.py --minutes 60 --seed 0 --output demo

`--architecture llama`, `gpt_neox` or `mixtral` (eight experts, two of them for each token) trains
a model of that kind instead, about as large and on the same text, to try tools on more than one
architecture.

The output directory loads with `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer`. It also
holds `heldout.txt` (library files kept out of training, to evaluate on), `calibration.txt` (some
that were trained on, to calibrate quantization with) and `MODEL_CARD.md`, whose
numbers are all measured by this script from the saved files. A killed run continues where it was
when the same command is given again. Needs torch, transformers, tokenizers and bitsandbytes; the
matrix products run in bfloat16, which is slow on a CPU without AVX512-BF16 or AMX.
"""

import argparse
import hashlib
import itertools
import math
import platform
import sys
import sysconfig
import time
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import __version__ as transformers_version
from transformers.pytorch_utils import Conv1D

VOCABULARY, CONTEXT, WIDTH, LAYERS, HEADS = 4096, 256, 256, 4, 4
BATCH, PEAK_RATE, WARMUP = 16, 2e-3, 0.02  # windows a step; learning rate; share of the budget
HELDOUT_BYTES, HELDOUT_FILE_BYTES = 200_000, range(1_000, 40_000)  # all of it; one file in it
CALIBRATION_BYTES = 230_000  # of training files
SIZE_LIMIT = 10_000_000  # bytes of the whole directory of the demo: it travels inside a wheel
END = "<|endoftext|>"
NF2_LEVELS = torch.tensor([-1.0, 0.0, 0.33791524171829224, 1.0])

# No dropout: a few epochs on a model this small leave nothing to regularize.
SHAPE = {
    "max_position_embeddings": CONTEXT,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_positions": CONTEXT,
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "llama": {**SHAPE, "intermediate_size": 3 * WIDTH, "num_key_value_heads": HEADS // 2},
    "gpt_neox": {
        **SHAPE,
        "intermediate_size": 4 * WIDTH,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    },
    "mixtral": {
        **SHAPE,
        "intermediate_size": WIDTH // 2,
        "num_key_value_heads": HEADS // 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "output_router_logits": True,  # the loss below keeps all experts in use
        "router_aux_loss_coef": 0.02,
    },
}


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------- the text


def read_library() -> tuple[list[str], list[str]]:
    """The standard library as (training, held-out) documents, each headed by its path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: dict[str, str] = {}
    heldout: list[tuple[str, str, str]] = []  # (hash of the path, path, document)
    seen: set[str] = set()
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        # Installed packages, tables, generated files (which know this machine's paths), and
        # lib2to3's deliberately odd test inputs.
        if path.startswith(("site-packages/", "dist-packages/", "encodings/", "pydoc_data/")):
            continue
        if path.startswith(("lib2to3/tests/", "_sysconfigdata", "config-")):
            continue
        try:
            with tokenize.open(file) as source:
                text = source.read()
        except SyntaxError:  # tests of broken encodings
            continue
        # What is neither letters nor white space is mostly numbers and escapes: a table.
        words = sum(c.isalpha() or c.isspace() for c in text)
        if text in seen or words < 0.65 * len(text) or not text.strip():
            continue
        seen.add(text)
        document = f"# Lib/{path}\n{text.rstrip()}\n"
        # By hash, so that a file keeps its side whatever else the library gains or loses.
        digest = hashlib.sha256(path.encode()).hexdigest()
        if int(digest, 16) % 100 < 3:
            heldout.append((digest, path, document))
        else:
            train[path] = document

    # A held-out file that is mostly lines of some training file would test memory, not the model.
    known = {line.strip() for text in train.values() for line in text.splitlines()}
    chosen: list[tuple[str, str]] = []
    total = 0
    for _, path, document in sorted(heldout):
        size = len(document.encode())
        if size not in HELDOUT_FILE_BYTES or total + size > HELDOUT_BYTES:
            continue
        if known_share(document, known) < 0.3:
            chosen.append((path, document))
            total += size
    return list(train.values()), [document for _, document in sorted(chosen)]


def known_share(document: str, known: set[str]) -> float:
    """The share of a document's longer lines that occur, stripped, in `known`."""
    lines = [line.strip() for line in document.splitlines() if len(line.strip()) >= 30]
    return sum(line in known for line in lines) / max(len(lines), 1)


def calibration_text(documents: list[str]) -> str:
    """Training files to calibrate quantization on, chosen by the hash of what is in them."""
    chosen: list[str] = []
    total = 0
    for document in sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest()):
        size = len(document.encode())
        if size in HELDOUT_FILE_BYTES and total + size <= CALIBRATION_BYTES:
            chosen.append(document)
            total += size
    return "\n".join(chosen)


def find_licence() -> Path:
    for folder in (sysconfig.get_paths()["stdlib"], sys.base_prefix):
        if (licence := Path(folder, "LICENSE.txt")).is_file():
            return licence
    sys.exit(
        "error: this Python comes without its LICENSE.txt\n"
        "cause: heldout.txt is an excerpt of the standard library and must travel with it\n"
        "hint: use a Python from python.org, pyenv, uv or a Linux distribution"
    )


def train_tokenizer(documents: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def to_stream(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """All documents as one row of tokens, each after an end-of-text token."""
    end = tokenizer.token_to_id(END)
    encodings = tokenizer.encode_batch_fast(documents)
    return torch.tensor([token for e in encodings for token in (end, *e.ids)])


def to_windows(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """Non-overlapping contexts of a text; what does not fill the last one is dropped."""
    tokens = torch.tensor(tokenizer.encode(text).ids)
    return tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def batches(stream: torch.Tensor, seed: int, step: int) -> Iterator[tuple[torch.Tensor, int]]:
    """(tokens, epoch) from `step` on: every epoch in its own order, cut at its own offset.

    The order hangs on seed and step alone, so a resumed run sees what an unbroken one would.
    """
    windows = (len(stream) - 1) // CONTEXT - 1
    steps = windows // BATCH  # an epoch
    for epoch in itertools.count(step // steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        offset = int(torch.randint(CONTEXT, (), generator=generator))
        order = torch.randperm(windows, generator=generator)
        for place in range(step % steps if epoch == step // steps else 0, steps):
            starts = order[place * BATCH : (place + 1) * BATCH] * CONTEXT + offset
            yield stream[starts[:, None] + torch.arange(CONTEXT + 1)], epoch


# -------------------------------------------------------------------------------- the training


def build_model(architecture: str) -> PreTrainedModel:
    # No padding token: with one in config.json, every forward pass over an end-of-text token warns
    # about a missing attention mask; the tokenizer and the generation settings carry it instead.
    config = AutoConfig.for_model(
        architecture,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        **SETTINGS[architecture],
    )
    return AutoModelForCausalLM.from_config(config)


def balance(model: PreTrainedModel, predicted: Any) -> torch.Tensor | float:
    """What a mixture of experts is charged for using some of them more than others."""
    found = getattr(predicted, "aux_loss", None)
    return 0.0 if found is None else found * model.config.router_aux_loss_coef


def learning_rate(share: float) -> float:
    """Warmup, then a cosine down to zero, over the share of the time budget that is used up."""
    if share < WARMUP:
        return PEAK_RATE * max(share, 1e-4) / WARMUP
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * min(1.0, (share - WARMUP) / (1 - WARMUP))))


def train(
    architecture: str,
    stream: torch.Tensor,
    windows: torch.Tensor,
    budget: float,
    seed: int,
    state: dict[str, Any],
    checkpoint: Path,
) -> PreTrainedModel:
    """Train until `budget` seconds are used up, keeping `state` and its file up to date."""
    torch.manual_seed(seed)
    model = build_model(architecture)
    matrices = [p for p in model.parameters() if p.dim() >= 2]  # experts are stacked
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)
    if "model" in state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        log(f"resuming at step {state['step']}, {state['seconds']:.0f} s into the budget")

    def save() -> None:
        state.update(model=model.state_dict(), optimizer=optimizer.state_dict())
        torch.save(state, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)  # never half a checkpoint

    period = min(120.0, budget / 4)  # seconds between evaluations
    evaluated = state["seconds"]
    cpu = time.process_time() - state["cpu_seconds"]
    start = time.monotonic() - state["seconds"]
    for tokens, epoch in batches(stream, seed, state["step"]):
        state["seconds"] = time.monotonic() - start
        state["cpu_seconds"] = time.process_time() - cpu
        if state["seconds"] >= budget:
            break
        rate = learning_rate(state["seconds"] / budget)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(tokens[:, :-1], use_cache=False)
        loss = F.cross_entropy(predicted.logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        (loss + balance(model, predicted)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1
        keep = min(0.99, 1 - 1 / state["step"])  # a running mean over the last hundred steps or so
        state["train_loss"] = keep * state["train_loss"] + (1 - keep) * loss.item()
        if state["seconds"] - evaluated >= period:
            evaluated = state["seconds"]
            save()
            with torch.autocast("cpu", torch.bfloat16):
                heldout, _ = measure(model, windows)
            speed = state["step"] * BATCH * CONTEXT / state["seconds"]
            log(
                f"{state['seconds']:6.0f} s  step {state['step']:6d}  epoch {epoch}  "
                f"lr {rate:.2e}  train {state['train_loss']:.4f}  held-out {heldout:.4f}  "
                f"{speed:.0f} tokens/s"
            )
    save()
    return model


# ----------------------------------------------------------------------------- the measurements


def measure(
    model: PreTrainedModel, windows: torch.Tensor, reference: PreTrainedModel | None = None
) -> tuple[float, float]:
    """(mean negative log likelihood of a token, mean KL divergence from the reference), nats."""

    def log_probabilities(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
        logits = model(batch, use_cache=False).logits[:, :-1]
        return F.log_softmax(logits.flatten(0, 1).float(), dim=-1)

    loss = divergence = 0.0
    with torch.inference_mode():
        for batch in windows.split(4):  # few at a time: the logits stay in reach of the caches
            q = log_probabilities(model, batch)
            loss += float(F.nll_loss(q, batch[:, 1:].flatten(), reduction="sum"))
            if reference is not None:
                p = log_probabilities(reference, batch)
                divergence += float(F.kl_div(q, p, reduction="sum", log_target=True))
    count = windows.shape[0] * (CONTEXT - 1)
    return loss / count, divergence / count


def nf4(weight: torch.Tensor) -> torch.Tensor:
    packed, quant_state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return bnb.dequantize_4bit(packed, quant_state)


def nf2(weight: torch.Tensor) -> torch.Tensor:
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    codes = torch.bucketize(blocks / scale, (NF2_LEVELS[1:] + NF2_LEVELS[:-1]) / 2)
    return (NF2_LEVELS[codes] * scale).view_as(weight)


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def quantized(directory: Path, rounding: Callable[[torch.Tensor], torch.Tensor]) -> PreTrainedModel:
    """The saved model with every linear layer's and expert's weight rounded; embeddings stay."""
    model = load(directory)
    for parameter in model.parameters():
        if parameter.dim() == 3:  # experts x out x in
            parameter.data = rounding(parameter.data)
    for module in model.modules():
        if isinstance(module, Conv1D):  # stores in x out; bitsandbytes packs out x in
            module.weight.data = rounding(module.weight.data.T.contiguous()).T.contiguous()
        elif isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            module.weight.data = rounding(module.weight.data)  # the head is tied to the embeddings
    return model


def sample(model: PreTrainedModel, tokenizer: Tokenizer, prompt: str, **options: Any) -> str:
    torch.manual_seed(0)
    inputs = torch.tensor([tokenizer.encode(prompt).ids])
    tokens = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=80, **options
    )
    return str(tokenizer.decode(tokens[0].tolist()))


# -------------------------------------------------------------------------------------- the card


def write_card(
    output: Path,
    tokenizer: Tokenizer,
    documents: list[str],
    heldout_documents: list[str],
    stream_tokens: int,
    state: dict[str, Any],
    minutes: float,
    seed: int,
) -> None:
    """Measure what lies in `output` and write it down."""
    reference = load(output)
    heldout = (output / "heldout.txt").read_text(encoding="utf-8")
    windows = to_windows(tokenizer, heldout)
    heldout_bytes, heldout_tokens = len(heldout.encode()), len(tokenizer.encode(heldout).ids)
    rows: list[str] = []
    for name, model in (
        ("bfloat16", reference),
        ("NF4 (bitsandbytes)", quantized(output, nf4)),
        ("NF2 (levels -1, 0, 0.338, 1)", quantized(output, nf2)),
    ):
        loss, kl = measure(model, windows, reference)
        bits = loss / math.log(2) * heldout_tokens / heldout_bytes
        rows.append(f"| {name} | {loss:.4f} | {math.exp(loss):.3f} | {bits:.4f} | {kl:.5f} |")
        log(rows[-1])
    evaluation = "\n".join(rows)
    known = {line.strip() for text in documents for line in text.splitlines()}
    train_bytes = sum(len(text.encode()) for text in documents)
    steps, seconds = state["step"], state["seconds"]
    seen = steps * BATCH * CONTEXT
    python = f"{platform.python_implementation()} {platform.python_version()}"
    capability = torch.backends.cpu.get_cpu_capability()
    hardware = f"{torch.get_num_threads()} CPU threads ({platform.machine()}, {capability})"
    greedy_prompt, sampled_prompt = "def read(self", "class Queue"
    greedy = sample(reference, tokenizer, greedy_prompt, do_sample=False)
    sampled = sample(
        reference, tokenizer, sampled_prompt, do_sample=True, temperature=0.8, top_k=50
    )
    architecture, parameters = reference.config.model_type, reference.num_parameters()
    if architecture == "gpt2":
        title, kind = "`demo`: the model built into `loftq`", "GPT-2"
        tags, option, folder = "gpt2, demo", "", "demo"
        purpose = """\
It exists so that every command of `loftq` has a real, trained model to work on, at once
and without a network."""
    else:
        title, kind = f"A small model for trying `loftq`: {architecture}", f"`{architecture}` model"
        tags, option, folder = architecture, f"--architecture {architecture} ", architecture
        purpose = """\
It exists to try `loftq` on a real, trained model of another architecture than that of
its built-in one."""
    card = f"""\
---
license: apache-2.0
language: code
library_name: transformers
pipeline_tag: text-generation
tags: [python, {tags}]
---

# {title}

A {kind} of {parameters:,} parameters ({LAYERS} layers, width {WIDTH}, {HEADS} heads,
context {CONTEXT} tokens, vocabulary {VOCABULARY}, tied head) that has read the Python standard
library. {purpose} All numbers here were measured by the script that made it, those under
Evaluation from the files beside this card.

## Data

The `.py` files of the standard library of {python}, its tests included; without installed
packages, tables, generated files and duplicates. {len(documents):,} files, {train_bytes:,} bytes,
{stream_tokens:,} tokens of a byte-level BPE trained on the same text.

Before that, 3 % of all files (by hash of the path) were set aside, never to be trained on.
`heldout.txt` holds {len(heldout_documents)} of them, whole and one after the other, each under a
line with its path: {heldout_bytes:,} bytes, {heldout_tokens:,} tokens. Of its lines of 30 or more
characters, {known_share(heldout, known):.1%} also occur somewhere in the training files (common
idioms, licence headers). No choice was made by looking at it: no early stopping.
`calibration.txt` is an excerpt of the training files, to calibrate quantization with.

## Training

| | |
|---|---|
| steps | {steps:,} of {BATCH} x {CONTEXT}: {seen:,} tokens, {seen / stream_tokens:.1f} epochs |
| optimizer | AdamW, learning rate {PEAK_RATE:g}, {WARMUP:.0%} warmup, cosine to zero; no dropout |
| hardware | {hardware}, bfloat16 autocast |
| time | {seconds:,.0f} s ({state["cpu_seconds"]:,.0f} s of CPU), {seen / seconds:,.0f} tokens/s |
| train loss | {state["train_loss"]:.4f} nats per token (running mean at the end) |

## Evaluation

On `heldout.txt` in {len(windows)} non-overlapping contexts of {CONTEXT} tokens, the first token of
each not predicted; bfloat16 weights as saved, computed in float32. A token is
{heldout_bytes / heldout_tokens:.2f} bytes on average. The quantized rows round every linear layer's
weight (not the embeddings) to the nearest level in blocks of 64, with nothing done about the error:
what a LoftQ start has to repair.

| weights | loss | perplexity | bits per byte | KL to the first row (nats) |
|---|---|---|---|---|
{evaluation}

## Samples

Greedy, after `{greedy_prompt}`:

```python
{greedy}
```

Sampled (temperature 0.8, top-k 50), after `{sampled_prompt}`:

```python
{sampled}
```

## Limitations

It writes text that looks like Python. It knows nothing, follows no instructions, and its code does
not run but by luck; it may repeat passages of the standard library word for word. Good for trying
and testing tools, not for judging how a method does on models that people use.

## Licence

The weights and the tokenizer are under Apache-2.0, like `loftq`. `heldout.txt` and
`calibration.txt` are excerpts of the Python standard library, Copyright (c) 2001 Python Software
Foundation; All Rights Reserved; they and the rest of the training text are under the PSF License
Version 2, whose text is in `LICENSE-PSF.txt` (single files carry further notices in their own
text). Changed in both: a line with the path before each file, and blank lines at its end.

## Make it again

    python examples/train_demo.py {option}--minutes {minutes:g} --seed {seed} --output {folder}

{python}, torch {torch.__version__}, transformers {transformers_version}. The schedule follows the
clock, so a faster machine takes more steps and ends with a better model.
"""
    (output / "MODEL_CARD.md").write_text(card, encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the model that ships inside loftq.")
    parser.add_argument("--architecture", choices=SETTINGS, default="gpt2")
    parser.add_argument("--minutes", type=float, default=60, help="time budget of the training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    options = parser.parse_args()
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output.with_name(f"{output.name}.checkpoint")
    licence = find_licence()

    documents, heldout_documents = read_library()
    identity = [options.architecture, options.seed, platform.python_version(), len(documents)]
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "cpu_seconds": 0.0, "train_loss": 0.0}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["identity"] != identity:
            sys.exit(
                f"error: {checkpoint} is of another run\n"
                f"cause: its architecture, seed, Python and number of files are "
                f"{state['identity']}, not {identity}\n"
                f"hint: rm {checkpoint}"
            )
        tokenizer = Tokenizer.from_str(state["tokenizer"])
    else:
        tokenizer = train_tokenizer(documents)
        state.update(identity=identity, tokenizer=tokenizer.to_str())
    stream = to_stream(tokenizer, documents)
    heldout = "\n".join(heldout_documents)
    windows = to_windows(tokenizer, heldout)
    log(
        f"{len(documents)} files, {len(stream)} tokens to train on; "
        f"{len(heldout_documents)} files, {windows.numel()} tokens held out"
    )
    minutes, seed = options.minutes, options.seed
    model = train(options.architecture, stream, windows, minutes * 60, seed, state, checkpoint)

    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.to(torch.bfloat16).save_pretrained(output)
    ends = {"bos_token": END, "eos_token": END, "pad_token": END}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=CONTEXT, **ends
    ).save_pretrained(output)
    (output / "heldout.txt").write_text(heldout, encoding="utf-8", newline="\n")
    calibration = calibration_text(documents)
    (output / "calibration.txt").write_text(calibration, encoding="utf-8", newline="\n")
    (output / "LICENSE-PSF.txt").write_bytes(licence.read_bytes())
    write_card(output, tokenizer, documents, heldout_documents, len(stream), state, minutes, seed)
    size = sum(file.stat().st_size for file in output.iterdir())
    if options.architecture == "gpt2" and size >= SIZE_LIMIT:
        sys.exit(f"error: {output} has {size} bytes, which is not under {SIZE_LIMIT}")
    checkpoint.unlink()
    log(f"{output}: {size} bytes")


if __name__ == "__main__":
    main()
