"""A small hybrid mixture-of-experts model, trained from nothing on the texts of this repository.

Qwen3.5's text model at a small size: gated DeltaNet and full attention three to one, routed experts and a shared one.
The tokenizer and the weights come from configs/data/calibration.txt; configs/data/evaluation.txt shares no passage
with it and is only looked at. The checkpoint is laid out as on the hub: BF16, experts packed.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig, Qwen3_5Tokenizer

ROOT = Path(__file__).parent.parent
TRAINING_TEXT = ROOT / "configs" / "data" / "calibration.txt"
HELD_OUT_TEXT = ROOT / "configs" / "data" / "evaluation.txt"
RECORD = "training.json"
EVALUATED = 32  # windows of a text

# What two idle cores manage; a fixed number of steps makes a checkpoint that does not depend on the time there is.
_STEPS_A_MINUTE = 75
_KEPT_IN_F32 = ("linear_attn.A_log", "linear_attn.norm.weight")


@dataclass(frozen=True, kw_only=True)
class Training:
    """Everything that decides what is trained."""

    steps: int
    seed: int = 0
    vocabulary: int = 1024
    hidden: int = 192
    layers: int = 8
    experts: int = 8
    experts_per_token: int = 2
    intermediate: int = 96
    heads: int = 4
    head: int = 64
    length: int = 256
    batch: int = 4
    rate: float = 3e-3
    warmup: int = 40
    decay: float = 0.1
    balance: float = 0.01

    @classmethod
    def of_minutes(cls, minutes: float) -> Training:
        """As long as that takes on two idle cores."""
        return cls(steps=max(1, round(minutes * _STEPS_A_MINUTE)))


def trained(training: Training, directory: Path) -> dict[str, Any]:
    """The record of a training run; it is done if the checkpoint of these settings is not there."""
    try:
        record: dict[str, Any] = json.loads((directory / RECORD).read_text())
    except FileNotFoundError:
        record = {}
    if record.get("settings") == asdict(training):
        return record
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RECORD).unlink(missing_ok=True)
    tokenizer = make_tokenizer(training)
    started = time.monotonic(), time.process_time()
    model, history = train(training, tokenizer)
    seconds, of_cpu = time.monotonic() - started[0], time.process_time() - started[1]
    save(model, tokenizer, directory)
    record = {
        "settings": asdict(training),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_of_text": len(_ids(TRAINING_TEXT, tokenizer)),
        "tokens_trained": training.steps * training.batch * training.length,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(of_cpu, 1),
        "threads": torch.get_num_threads(),
        "running_loss": history,
        "losses": losses(directory, training.length),
    }
    (directory / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return record


def make_tokenizer(training: Training) -> Qwen3_5Tokenizer:
    """Qwen3.5's own tokenizer with a vocabulary of exactly `vocabulary` tokens, from the training text."""
    tokenizer = Qwen3_5Tokenizer().train_new_from_iterator(
        [TRAINING_TEXT.read_text()],
        vocab_size=training.vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    assert len(tokenizer) == training.vocabulary
    return tokenizer


def new_model(training: Training) -> Qwen3_5MoeForCausalLM:
    """The model with random weights, in float32."""
    config = Qwen3_5MoeTextConfig(
        vocab_size=training.vocabulary,
        hidden_size=training.hidden,
        num_hidden_layers=training.layers,
        num_attention_heads=training.heads,
        num_key_value_heads=training.heads // 2,
        head_dim=training.head,
        layer_types=["full_attention" if layer % 4 == 3 else "linear_attention" for layer in range(training.layers)],
        full_attention_interval=4,
        attn_output_gate=True,
        mamba_ssm_dtype="float32",
        linear_conv_kernel_dim=4,
        linear_key_head_dim=training.head,
        linear_value_head_dim=training.head,
        linear_num_key_heads=training.heads // 2,
        linear_num_value_heads=training.heads,
        moe_intermediate_size=training.intermediate,
        shared_expert_intermediate_size=training.intermediate,
        num_experts=training.experts,
        num_experts_per_tok=training.experts_per_token,
        router_aux_loss_coef=training.balance,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
        },
        max_position_embeddings=2 * training.length,
        initializer_range=0.04,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=0,
    )
    config.architectures = [Qwen3_5MoeForCausalLM.__name__]
    torch.manual_seed(training.seed)
    return Qwen3_5MoeForCausalLM._from_config(config, experts_implementation="eager")


def train(training: Training, tokenizer: Qwen3_5Tokenizer) -> tuple[Qwen3_5MoeForCausalLM, list[Any]]:
    """The trained model and its running loss."""
    text = _ids(TRAINING_TEXT, tokenizer)
    model = new_model(training)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": training.decay}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    generator = torch.Generator().manual_seed(training.seed)
    history: list[dict[str, float]] = []
    recent: list[float] = []
    report = max(1, training.steps // 20)
    started = time.monotonic()
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(training, step)
        starts = torch.randint(len(text) - training.length, (training.batch,), generator=generator)
        tokens = torch.stack([text[start : start + training.length] for start in starts.tolist()])
        output = model(input_ids=tokens, labels=tokens, use_cache=False, output_router_logits=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(float(output.loss.detach() - training.balance * output.aux_loss.detach()))
        if (step + 1) % report == 0 or step + 1 == training.steps:
            history.append({"step": step + 1, "loss": round(sum(recent) / len(recent), 4)})
            recent = []
            seconds = time.monotonic() - started
            print(
                f"step {step + 1:5} of {training.steps}  loss {history[-1]['loss']:.3f}  {seconds:5.0f} s", flush=True
            )
    return model.eval(), history


def _rate(training: Training, step: int) -> float:
    """Linear warm-up, then half a cosine down to a hundredth."""
    if step < training.warmup:
        return training.rate * (step + 1) / training.warmup
    share = (step - training.warmup) / max(1, training.steps - training.warmup)
    return training.rate * (0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2)


def save(model: Qwen3_5MoeForCausalLM, tokenizer: Qwen3_5Tokenizer, directory: Path) -> None:
    """Write a checkpoint as the hub has them: BF16 but for the recurrence's own, experts packed."""
    state = {
        name: tensor.detach().contiguous().to(torch.float32 if name.endswith(_KEPT_IN_F32) else torch.bfloat16)
        for name, tensor in model.state_dict().items()
    }
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    model.config.dtype = "bfloat16"
    model.config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@torch.no_grad()
def losses(directory: Path, length: int) -> dict[str, float]:
    """Cross-entropy in nats per token of the checkpoint by transformers alone: text trained on, and text held out."""
    model = Qwen3_5MoeForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    found = {}
    for name, path in (("training_text", TRAINING_TEXT), ("held_out_text", HELD_OUT_TEXT)):
        parts = windows(path, tokenizer, length, EVALUATED).split(8)
        found[name] = round(float(torch.cat([_losses(model, part) for part in parts]).mean()), 4)
    return found


def windows(path: Path, tokenizer: Qwen3_5Tokenizer, length: int, count: int) -> Tensor:
    """Windows (count, length) of a text, evenly spread over it."""
    ids = _ids(path, tokenizer)
    whole = ids[: len(ids) // length * length].view(-1, length)
    return whole[torch.linspace(0, len(whole) - 1, min(count, len(whole))).long()]


def _ids(path: Path, tokenizer: Qwen3_5Tokenizer) -> Tensor:
    # verbose=False: a text longer than the model's context is what we want, not a mistake to warn about.
    return torch.tensor(tokenizer(path.read_text(), verbose=False)["input_ids"])


def _losses(model: Qwen3_5MoeForCausalLM, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
