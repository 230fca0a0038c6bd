"""Fine-tune a PEFT model with TRL's SFTTrainer. Texts are files of documents with blank lines between them."""

import argparse
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import lora_null
import lora_null.peft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("keep", type=Path, help="text like what must not be forgotten")
parser.add_argument("learn", type=Path, help="text of the task")
parser.add_argument("output", help="adapter folder to write")
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--rank", type=int, default=32)
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model)
tokenizer = AutoTokenizer.from_pretrained(args.model)
keep = [tokenizer(text, return_tensors="pt") for text in args.keep.read_text().split("\n\n")]
covariances = lora_null.calibrate(model, keep)

model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear"))
lora_null.peft.initialize_lora_null_weights(model, covariances)
lora_null.peft.use_fused_kernels(model)

data = Dataset.from_dict({"text": args.learn.read_text().split("\n\n")})
options = SFTConfig(f"{args.output}-run", max_steps=args.steps, learning_rate=1e-3, bf16=False, report_to=[])
SFTTrainer(model, args=options, train_dataset=data, processing_class=tokenizer).train()
lora_null.peft.save_adapter(model, args.output)
