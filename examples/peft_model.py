"""Start a PEFT model's adapter, train it in a plain loop, save it, and go on training from the file."""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_null
import lora_null.peft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("keep", type=Path, help="text like what must not be forgotten")
parser.add_argument("learn", type=Path, help="text of the task")
parser.add_argument("output", help="adapter folder to write")
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--rank", type=int, default=32)
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model)
tokenizer = AutoTokenizer.from_pretrained(args.model)
keep, learn = (
    [tokenizer(text, return_tensors="pt") for text in file.read_text().split("\n\n")]
    for file in (args.keep, args.learn)
)
covariances = lora_null.calibrate(model, keep)
model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear"))
lora_null.peft.initialize_lora_null_weights(model, covariances)
lora_null.peft.use_fused_kernels(model)

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
for batch in learn:
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
lora_null.peft.save_adapter(model, args.output)
base = AutoModelForCausalLM.from_pretrained(args.model)
resumed = lora_null.peft.load_trainable(base, args.output, covariances=covariances)  # A stays in its directions
