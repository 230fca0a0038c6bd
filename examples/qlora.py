"""Fine-tune on a 4-bit base. With A frozen the base stays as it is, so it may be quantised."""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import lora_null

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("keep", type=Path, help="text like what must not be forgotten")
parser.add_argument("learn", type=Path, help="text of the task")
parser.add_argument("output", help="adapter folder to write")
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--rank", type=int, default=32)
args = parser.parse_args()

bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=bits, dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(args.model)
keep, learn = (
    [tokenizer(text, return_tensors="pt").to(model.device) for text in file.read_text().split("\n\n")]
    for file in (args.keep, args.learn)
)
config = lora_null.LoraNullConfig(r=args.rank)
covariances = lora_null.calibrate(model, keep, config)
model = lora_null.initialize(model, covariances, config)

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
for batch in learn:
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
lora_null.save_adapter(model, args.output)  # plain LoRA, for the quantised and for the full base
