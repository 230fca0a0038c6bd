"""Fine-tune on a 4-bit base and merge into it: what is written is a 4-bit model of the same codes (QA-LoRA)."""

import argparse
from pathlib import Path

import torch
from torchao.quantization import IntxWeightOnlyConfig, MappingType
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

import lora_null

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("keep", type=Path, help="text like what must not be forgotten")
parser.add_argument("learn", type=Path, help="text of the task")
parser.add_argument("output", help="model folder to write")
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--group", type=int, default=32, help="inputs that share a scale and a zero point")
args = parser.parse_args()

kind = IntxWeightOnlyConfig(torch.int4, PerGroup(args.group), MappingType.ASYMMETRIC)
options = {"quantization_config": TorchAoConfig(kind), "dtype": torch.float32, "device_map": "cpu"}
model = AutoModelForCausalLM.from_pretrained(args.model, **options)
tokenizer = AutoTokenizer.from_pretrained(args.model)
keep, learn = (
    [tokenizer(text, return_tensors="pt") for text in file.read_text().split("\n\n")]
    for file in (args.keep, args.learn)
)
config = lora_null.LoraNullConfig(r=args.rank, group_pooling="auto")  # the base's group size
model = lora_null.initialize(model, lora_null.calibrate(model, keep, config), config)

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
for batch in learn:
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
lora_null.merge(model).save_pretrained(args.output)
tokenizer.save_pretrained(args.output)
