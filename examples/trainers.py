"""Structure-aware learning rates in the trainers of transformers, accelerate and Lightning.

    pip install 'einlinear[pretrained]' accelerate lightning
    python examples/trainers.py transformers accelerate lightning

All three train the same small Llama on the same batches, with the same parameter groups, so they end with the same
loss. A loop in the style of torchtitan, with several processes, is examples/tensor_parallel_gpt.py.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM

import einlinear as el

VOCABULARY, LENGTH, BATCH, STEPS = 32, 16, 16, 20


class Chains(IterableDataset[dict[str, Tensor]]):
    """Sequences of tokens, each three times the one before plus one."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(BATCH * STEPS):
            tokens = [int(torch.randint(VOCABULARY, (), generator=generator))]
            while len(tokens) < LENGTH:
                tokens.append((3 * tokens[-1] + 1) % VOCABULARY)
            yield {"input_ids": torch.tensor(tokens), "labels": torch.tensor(tokens)}


def llama(width: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None))


def structured() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = llama(128)
    el.convert(model, {"*.self_attn.*": "btt(rank=2)", "*.mlp.*": "low_rank(rank=16)"})
    el.init_(model, base=llama(64))
    return model


def optimizer_of(model: nn.Module) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Return AdamW with a rate for each role and structure, and a schedule that scales them all."""
    # 1e-2 is the learning rate of the dense model of width 64
    optimizer = torch.optim.AdamW(el.param_groups(model, lr=1e-2, base=llama(64), weight_decay=0.1))
    return optimizer, LambdaLR(optimizer, lambda step: 1 - step / STEPS)


def train_with_transformers(model: LlamaForCausalLM) -> list[float]:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            max_steps=STEPS,
            logging_steps=1,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=Chains(), optimizers=optimizer_of(model))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def train_with_accelerate(model: LlamaForCausalLM) -> list[float]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    # groups hold parameters: make them of the model before it is wrapped
    optimizer, schedule = optimizer_of(model)
    prepared: Any = accelerator.prepare(model, optimizer, DataLoader(Chains(), BATCH), schedule)
    wrapped, optimizer, data, schedule = prepared
    losses = []
    for batch in data:
        loss = wrapped(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_with_lightning(model: LlamaForCausalLM) -> list[float]:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.losses = model.train(), list[float]()

        def training_step(self, batch: dict[str, Tensor]) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            # the groups of the model inside: its names are those that the base has
            optimizer, schedule = optimizer_of(self.model)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module, quiet = Module(), {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=STEPS, gradient_clip_val=1.0, enable_model_summary=False, **quiet
    )
    trainer.fit(module, DataLoader(Chains(), BATCH))
    return module.losses


TRAINERS: dict[str, Callable[[LlamaForCausalLM], list[float]]] = {
    "transformers": train_with_transformers,
    "accelerate": train_with_accelerate,
    "lightning": train_with_lightning,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainers", nargs="+", choices=TRAINERS, metavar="trainer", help=", ".join(TRAINERS))
    rows = ["| trainer | learning rates | first loss | last loss |", "| --- | --- | --- | --- |"]
    for name in parser.parse_args().trainers:
        model = structured()
        rates = {group["lr"] for group in el.param_groups(model, lr=1e-2, base=llama(64))}
        losses = TRAINERS[name](model)
        rows.append(f"| {name} | {len(rates)} | {losses[0]:.4f} | {losses[-1]:.4f} |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
