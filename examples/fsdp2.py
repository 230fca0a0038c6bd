"""Fine-tune with FSDP2: torchrun --nproc-per-node=2 examples/fsdp2.py keep.txt learn.txt adapter."""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_null

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("texts", type=Path, nargs=2, help="what must not be forgotten, and the task")
parser.add_argument("output", help="adapter folder to write")
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--rank", type=int, default=32)
args = parser.parse_args()

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
model = AutoModelForCausalLM.from_pretrained(args.model)
tokenizer = AutoTokenizer.from_pretrained(args.model)
keep, learn = ([tokenizer(t, return_tensors="pt") for t in f.read_text().split("\n\n")] for f in args.texts)

config = lora_null.LoraNullConfig(r=args.rank)
covariances = lora_null.calibrate(model, keep, config)  # all processes call it, and divide the work
model = lora_null.initialize(model, covariances, config)  # before the model is sharded
for layer in [*model.model.layers, model]:
    fully_shard(layer)

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
for batch in learn[rank : len(learn) // world * world : world]:
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
lora_null.save_adapter(model, args.output)  # all processes call it, the first writes
dist.destroy_process_group()
