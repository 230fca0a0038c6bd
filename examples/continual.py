"""Learn tasks one after the other, each in directions that neither the kept text nor an earlier task uses."""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_null

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("keep", type=Path, help="text like what must not be forgotten")
parser.add_argument("tasks", type=Path, nargs="+", help="text of each task")
parser.add_argument("output", type=Path, help="folder to write: an adapter for each task, and the merged model")
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--rank", type=int, default=32)
parser.add_argument("--energy", type=float, default=0.99, help="share of the activations' energy to protect")
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model)
tokenizer = AutoTokenizer.from_pretrained(args.model)
keep, *tasks = (
    [tokenizer(text, return_tensors="pt") for text in file.read_text().split("\n\n")]
    for file in (args.keep, *args.tasks)
)
config = lora_null.LoraNullConfig(r=args.rank, train="b_in_basis", energy=args.energy)
covariances = lora_null.calibrate(model, keep, config)
for file, batches in zip(args.tasks, tasks, strict=True):
    lora_null.initialize(model, covariances, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    for batch in batches:
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lora_null.save_adapter(model, args.output / file.stem)  # on the model that earlier tasks are merged into
    model = lora_null.merge(model)
    covariances = covariances + lora_null.calibrate(model, batches, config)
model.save_pretrained(args.output / "merged")
