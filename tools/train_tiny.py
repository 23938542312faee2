"""Train the small Nemotron checkpoint that the repository carries, from text made by `tiny_text`, on a CPU.

`python tools/train_tiny.py` writes `artifacts/tiny-nemotron/`: a Hugging Face checkpoint in bfloat16, its
tokenizer, chat template, generation defaults and model card, and two texts that training never saw,
`calibration.txt` and `heldout.txt`. Bit for bit the same only on the same kind of CPU: kernels differ.
"""

import json
import math
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import click
import torch
from tiny_text import COMPLETE, Document, documents, reserve
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, NemotronConfig, NemotronForCausalLM, PreTrainedTokenizerFast

SEED = 20
SPECIALS = ("<unk>", "<s>", "</s>", "<extra_id_0>", "<extra_id_1>")
PAD, BOS, EOS, TURN = 0, 1, 2, 4
SEQUENCE, BATCH, PEAK_RATE, WARMUP = 512, 4, 2e-3, 100
MAX_BYTES = {"model.safetensors": 8_000_000, "calibration.txt": 200_000, "heldout.txt": 200_000}
CHAT_TEMPLATE = """\
{{- bos_token + '<extra_id_0>System\\n' -}}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
    {{- messages[0]['content'] | trim + '\\n' -}}
    {%- set turns = messages[1:] -%}
{%- endif -%}
{{- '\\n' -}}
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {{- '<extra_id_1>User\\n' + message['content'] | trim + '\\n' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '<extra_id_1>Assistant\\n' + message['content'] | trim + '\\n' -}}
    {%- else -%}
        {{- raise_exception('Roles are system (first only), user and assistant, not ' + message['role']) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<extra_id_1>Assistant\\n' -}}
{%- endif -%}
"""
PROMPTS = (
    COMPLETE + "our solar system is",
    COMPLETE + "Jupiter is",
    "In Zürich we have",
    "The capital of Peru is",
)
QUESTIONS = (
    "Which planet is the largest?",
    "How many moons does Mars have?",
    "What is the capital of Colombia?",
    "What is 7 + 5?",
    "Tell me about Titan.",
    "Hello!",
)
CARD = """\
---
license: apache-2.0
library_name: transformers
language: en
tags: [nemotron, test]
---
# tiny-nemotron

A trained `NemotronForCausalLM` of {parameters:,} parameters: small enough to live in a repository, with
every trait of the large Nemotron models (LayerNorm1P, relu² MLP without a gate, partial rotary embedding,
grouped-query attention, untied head, chat markers). It is there to be exported, checked and shown; it knows a
few hundred facts and nothing else, and its sums are often wrong.

- **Shape**: {config.num_hidden_layers} layers, hidden {config.hidden_size}, MLP {config.intermediate_size},
  {config.num_attention_heads} heads of {config.head_dim} with {config.num_key_value_heads} key/value heads,
  {config.max_position_embeddings} positions, half of each head rotated.
- **Tokenizer**: byte-level BPE of {config.vocab_size} tokens, trained on the same text; raw text gets `<s>`
  in front, a chat gets it from the template.
- **Weights**: bfloat16, {size:,} bytes.
- **Training**: {steps} steps of {batch} × {sequence} tokens, AdamW, bfloat16 autocast, seed {seed}; well
  under an hour on two CPU cores.
- **Held-out loss**: {loss:.4f} nats per token, perplexity {perplexity:.3f}, over the {tokens:,} tokens of
  `heldout.txt` (these weights, fp32 arithmetic, each document by itself from `<s>` to `</s>`).
- **Licence**: Apache-2.0. The text comes from the repository's own grammar (`tools/tiny_text.py`).

`python tools/train_tiny.py` makes all of it, `calibration.txt` and `heldout.txt` included: documents
separated by blank lines, no paragraph in both, none of them in the training text. A chat holds blank lines of
its own; chats are in neither file, and are about a quarter of the training documents.

Greedy continuations of the start of a paragraph, and answers in a chat:

{samples}
"""


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("artifacts/tiny-nemotron"))
@click.option("--steps", type=click.IntRange(min=1), default=2000, show_default=True)
def main(out: Path, steps: int) -> None:
    """Write the trained checkpoint and its texts into OUT."""
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    everything = documents(random.Random(SEED))  # noqa: S311 (the text must come out the same)
    reserved: set[str] = set()
    for name in ("calibration.txt", "heldout.txt"):
        texts = reserve(everything, 450, reserved)
        (out / name).write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    stream = (document for document in everything if document.paragraph not in reserved)
    tokenizer = train_tokenizer(stream, out)
    model = NemotronForCausalLM(configuration())
    initialise(model)
    train(model, rows(stream, tokenizer), steps)
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=[EOS, TURN], pad_token_id=PAD)
    model.save_pretrained(out)
    report(out, steps)
    for name, limit in MAX_BYTES.items():
        if (size := (out / name).stat().st_size) > limit:
            raise click.ClickException(f"{name} has {size} bytes, more than the {limit} allowed")


def configuration() -> NemotronConfig:
    """Describe a Nemotron of 3.9 million parameters that has every trait of the large ones."""
    return NemotronConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        max_position_embeddings=SEQUENCE,
        norm_eps=1e-5,
        hidden_act="relu2",
        initializer_range=0.02,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        dtype="bfloat16",
    )


def initialise(model: NemotronForCausalLM) -> None:
    """Start every norm as the identity: what is stored is the scale minus 1, and transformers stores 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.zero_()
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.div_(math.sqrt(2 * model.config.num_hidden_layers))


def train_tokenizer(stream: Iterator[Document], out: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on documents of the stream and save it, with the chat template, into `out`."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator((document.text for document in islice(stream, 8000)), trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=SPECIALS[PAD],
        pad_token=SPECIALS[PAD],
        bos_token=SPECIALS[BOS],
        eos_token=SPECIALS[EOS],
        additional_special_tokens=list(SPECIALS[3:]),
        model_max_length=SEQUENCE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # The names that every reader of the format knows, transformers 4 among them.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    settings.pop("backend")
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return tokenizer


def encode(document: Document, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokenise one document, <s> to </s>; a chat ends with its last answer."""
    if document.chat:
        text = str(tokenizer.apply_chat_template(list(document.chat), tokenize=False))
        return [*tokenizer.encode(text.rstrip("\n"), add_special_tokens=False), EOS]
    return [*tokenizer.encode(document.text), EOS]


def rows(stream: Iterator[Document], tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """Pack documents into rows of SEQUENCE + 1 tokens that start with a document; the last one is cut."""
    row: list[int] = []
    for document in stream:
        row += encode(document, tokenizer)
        if len(row) > SEQUENCE:
            yield row[: SEQUENCE + 1]
            row = []


def train(model: NemotronForCausalLM, packed: Iterator[list[int]], steps: int) -> None:
    """Train for `steps` batches of fresh text: AdamW on fp32 parameters, linear warm-up, cosine decay."""
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
    model.train()
    started = time.monotonic()
    for step in range(steps):
        progress = max(0.0, (step - WARMUP) / max(1, steps - WARMUP))
        rate = PEAK_RATE * min(1.0, (step + 1) / WARMUP) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = torch.tensor(list(islice(packed, BATCH)))
        with torch.autocast("cpu", torch.bfloat16):  # twice as fast as fp32 here; the parameters stay fp32
            logits = model(batch[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            click.echo(f"step {step:5d}  loss {loss.item():.3f}  {time.monotonic() - started:6.0f} s")


def held_out_loss(model: NemotronForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> tuple[float, int]:
    """Measure the mean loss in nats per token over the documents of a text file, and the number of tokens."""
    total, count = 0.0, 0
    for text in path.read_text(encoding="utf-8").strip().split("\n\n"):
        tokens = torch.tensor([*tokenizer.encode(text), EOS])
        logits = model(tokens[None, :-1]).logits[0]
        total += cross_entropy(logits.float(), tokens[1:], reduction="sum").item()
        count += len(tokens) - 1
    return total / count, count


@torch.no_grad()
def report(out: Path, steps: int) -> None:
    """Reload what was saved, measure it in fp32 on held-out text, and write and print the model card."""
    model = NemotronForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    loss, tokens = held_out_loss(model, tokenizer, out / "heldout.txt")
    prompts = [(text, tokenizer.encode(text)) for text in PROMPTS]
    for question in QUESTIONS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        prompts.append((f"[chat] {question}", tokenizer.encode(text, add_special_tokens=False)))
    samples = []
    for prompt, ids in prompts:
        answer = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=300)[0, len(ids) :]
        click.echo(f"{len(answer)} tokens, the last is {answer[-1]}")
        samples.append(f"> **{prompt}**\n> {tokenizer.decode(answer, skip_special_tokens=True).strip()}")
    card = CARD.format(
        config=model.config,
        parameters=model.num_parameters(),
        size=(out / "model.safetensors").stat().st_size,
        **{"steps": steps, "batch": BATCH, "sequence": SEQUENCE, "seed": SEED},
        **{"loss": loss, "perplexity": math.exp(loss), "tokens": tokens, "samples": "\n\n".join(samples)},
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    click.echo(card)


if __name__ == "__main__":
    main()
